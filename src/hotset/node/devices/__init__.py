"""What a node runs models on: CUDA GPUs, or virtual ones."""
