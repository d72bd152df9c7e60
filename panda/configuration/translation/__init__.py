"""What the configuration files of other tools mean in panda's keys: a table for each tool, and what applies it."""
