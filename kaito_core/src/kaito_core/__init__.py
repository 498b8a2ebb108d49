"""kaito: tune or serve an open model on GPUs you do not yet have.

The floors of this package, from the ground up; an import never goes up (import-linter checks it):

* ``problems``, ``progress``  what went wrong, and how far a job is: known to everyone
* ``api``, ``plugins``        the resources people write; what plugins hand over, and how they are found
* ``planning``, ``workloads`` pure functions: what will be done, and what will be run
* ``data``, ``artifacts``     training data; OCI images
* ``stages``                  the commands that a workload runs (fetch, check, push)
* ``local``                   runs a workload as processes on this machine
* ``cli``                     one file per command
"""

__version__ = "0.1.0"
