"""Fashion-MNIST: sources, verification, splits, batches and augmentation."""
