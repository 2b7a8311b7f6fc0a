"""FSDP2, as torch applies it: accelerate, which reads recipes/accelerate/fsdp2.yaml, has it for GPUs alone."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
import stformer_hf as sf

dist.init_process_group("gloo")
mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
whole_cell, half = (argument == "True" for argument in sys.argv[2:])
store = sf.CellStore(sys.argv[1])
tokenizer = sf.GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5], max_length=16, whole_cell=whole_cell)
collator = sf.DataCollatorForPhenotypicMLM(tokenizer, packing=True)
collator.set_epoch(0)
shape = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=16, cls_state="layers")
shape.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
config = sf.GeneBertConfig.from_tokenizer(tokenizer, **shape)
models = []
for _ in range(2):
    torch.manual_seed(0)
    models.append(sf.GeneBertForPhenotypicMLM(config).train())
whole, sharded = models
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if half else MixedPrecisionPolicy()
for part in (*sharded.gene_bert.layers, sharded):
    fully_shard(part, mesh=mesh, mp_policy=policy)
optimizers = [torch.optim.AdamW(model.parameters(), 1e-2) for model in models]
for step in range(3):
    cells = [range(start, start + 4) for start in (4 + 8 * step, 8 + 8 * step)]  # of the processes
    batches = [collator(store.__getitems__(list(of))) for of in cells]
    losses = [whole(**batch).loss for batch in batches]
    (sum(losses) / 2).backward()
    loss = sharded(**batches[rank]).loss
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    bound = 1e-2 if half else 1e-5
    torch.testing.assert_close(loss, losses[rank], atol=bound, rtol=bound)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("whole_cell", "half"), [(True, False), (False, True)])
def test_sharded_layers_learn_what_whole_ones_do(store, whole_cell, half):
    """In bfloat16 with float32 weights, too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--no-python"]
    command += [sys.executable, "-c", SCRIPT, str(store.path), str(whole_cell), str(half)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
