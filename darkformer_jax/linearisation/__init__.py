"""Makes a pretrained model linear in stages, each a run of its own: settings, plan, stages, figures and report."""
