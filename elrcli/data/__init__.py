"""From files on a disk to batches: manifest, images, transforms, cache, loader, noise."""
