"""What a stranger's first command looks at: the environment, and a try on a device."""
