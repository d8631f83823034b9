"""caravan: from raw text to your own ChatGPT, stage by stage."""

__version__ = "0.1.0"
