"""What happens around a step: panda's own lifecycle plugins, with no privileged access."""
