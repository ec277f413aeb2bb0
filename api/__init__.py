"""The wire contract: the job spec, the shapes of every answer and of every object in the bucket.

Both the control plane and the workers import this package, and it imports neither: what they must agree on lives
here, once. The client (`client.py`, `profile.py`, `cli.py`, `show.py`) needs no server library; `storage.py`, which
needs boto3, is for control plane and workers alone (docs/adr/0001).
"""

__version__ = "0.1.0"
