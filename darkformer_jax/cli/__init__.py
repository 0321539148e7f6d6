"""What the verbs share: flags, errors, progress."""
