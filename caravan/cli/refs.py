"""The door for references stands in caravan/refs.py, where recipes may use it too."""

from caravan.refs import Make, resolve

__all__ = ["Make", "resolve"]
