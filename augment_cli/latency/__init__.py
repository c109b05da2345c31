"""How long a model takes on this machine: its sites timed within the model that holds them, and models as wholes."""
