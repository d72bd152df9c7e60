"""An example of a package that adds components to panda. Names are declared in setup.cfg; nothing is imported here."""
