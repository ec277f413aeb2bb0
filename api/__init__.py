"""The wire contract: the job spec, the shapes of every answer and of every object in the bucket.

Nothing here does I/O except `client.py`. Both the control plane and the workers import this package, and
it imports neither: what they must agree on lives here, once.
"""

__version__ = "0.1.0.dev0"
