"""What ranks import, imported once: by the process that `tests.ranks` forks them from.

DeepSpeed's engine takes torch's compiler along, in all 3 s of CPU time in every rank.
"""

import gc

from cluster.session import set_defaults, worker_environment

set_defaults(worker_environment(gpu=False, threads=1))  # DeepSpeed reads some of it when it is imported

import deepspeed.runtime.engine  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401

import optim.step.zero  # noqa: E402, F401
import training.run.engine  # noqa: E402, F401

gc.collect()
gc.freeze()  # DeepSpeed collects garbage when it builds stage 3: not among all that is imported here
