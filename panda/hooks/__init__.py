"""panda's own lifecycle plugins. They have no access that other packages lack."""
