"""What is on disk: workdirs, checkpoints, manifests, metrics, stores."""
