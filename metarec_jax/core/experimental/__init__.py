"""Experimental: parts of the core that nothing else calls yet."""
