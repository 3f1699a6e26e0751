"""Files and models: reading, writing, and what identifies a result."""
