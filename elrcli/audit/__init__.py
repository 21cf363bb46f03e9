"""Finding wrong labels: evidence, scores, calibration, the report, and applying decisions."""

from elrcli.audit.run import audit_run

__all__ = ["audit_run"]
