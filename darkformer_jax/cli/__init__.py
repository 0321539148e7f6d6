"""What the verbs share: flags, errors and progress."""
