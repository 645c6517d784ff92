"""Experimental parts of the core, not used by the rest of the package."""
