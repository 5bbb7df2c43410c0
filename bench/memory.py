"""memory.py - memory of an update of the 1.5B model without a card, beside predict.py.

    python bench/memory.py                # 16 settings, half a minute each; --quick: one of them

Policy, reference, FSDP2, checkpointing and AdamW run as in grpo.py, on tensors that have shapes but no values
(FakeTensorMode) and among ranks that send nothing. Counted are the bytes of one rank's living storages. The
device is "cpu", but policy.py takes its CUDA branches: bf16 products, the varlen kernel and what it keeps.
Not in it: CUDA context, NCCL, fragmentation, workspaces inside kernels, for which predict.py adds RESERVE.
"""
import gc
import itertools
import weakref
from contextlib import contextmanager
from unittest import mock

import measure  # puts the project on the path
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import grpo
import policy as policy_lib
import predict

DOCUMENT, PROMPT = 8192, 150  # tokens of a full sequence, and of the prompt in it


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that still live: .now, .peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor calls its local operation, which comes here again
        result = func(*args, **kwargs or {})
        for x in filter(torch.is_tensor, tree_leaves(result)):
            self.count(x.untyped_storage())
        return result

    def count(self, storage):
        """A storage that is new or has another size than before."""
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self.forget, key)
        self.now += storage.nbytes() - self.sizes.get(key, 0)
        self.sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def forget(self, key):
        self.now -= self.sizes.pop(key)


@contextmanager
def simulated(world):
    """Inside, tensors have no values, policy.py takes them for a card's, and this is rank 0 of `world`."""
    def resize(storage, size):  # FSDP frees and fills gathered weights this way, without an operation
        resize_plainly(storage, size)
        live.count(storage)

    def use_varlen(policy):  # Policy._check without the comparison of values
        policy_lib.AttentionInterface.register("varlen", policy_lib.varlen_attention)
        policy.model.set_attn_implementation("varlen")

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    mesh = dist.init_device_mesh("cpu", (world,))  # out here, since it reads its ranks from a tensor
    live, resize_plainly, replace = LiveBytes(), torch.UntypedStorage.resize_, mock.patch.object
    try:
        with (replace(dist.device_mesh, "init_device_mesh", lambda *_: mesh), FakeTensorMode(), live,
              replace(FakeTensor, "is_cuda", True), replace(policy_lib.Policy, "_check", use_varlen),
              replace(torch.UntypedStorage, "resize_", resize)):
            yield live
    finally:
        dist.destroy_process_group()


def make_policy(m, recompute, dtype):
    model = AutoModelForCausalLM.from_config(measure.qwen2(m), dtype=dtype)
    return policy_lib.Policy(model, recompute).shard(torch.bfloat16)


def simulate(shape, args, world, budget):
    """The last micro-batch of an update and its optimizer step -> bytes of a rank: (before, peak)."""
    with simulated(world) as live:
        policy = make_policy(shape, args.recompute, torch.float32)
        reference = make_policy(shape, False, torch.bfloat16).requires_grad_(False)
        optimizer = torch.optim.AdamW(policy.parameters(), args.lr, fused=True)
        for p in policy.parameters():  # gradients of the micro-batches before this one
            p.grad = torch.zeros_like(p)
        step(policy, optimizer, args)  # Adam's moments; DTensor learns its shapes, on tensors of full size
        documents = [([i] * PROMPT, [1] * (DOCUMENT - PROMPT)) for i in range(budget // DOCUMENT)]
        micro = policy_lib.pack_row(documents)
        gc.collect()
        states, live.peak = live.now, live.now
        with torch.no_grad():
            scored = reference(micro, args.temperature)[0]
            reference.reshard()
        logp, entropy = policy(micro, args.temperature, entropy_grad=args.entropy_coef != 0)
        loss, _ = grpo.grpo_loss(logp, scored, torch.ones(len(documents)), micro.lengths, ref_logp=scored,
                                 entropy=entropy, kl_coef=args.kl_coef, entropy_coef=args.entropy_coef)
        (loss * policy.grad_divisor).backward()
        step(policy, optimizer, args)
        return states, live.peak


def step(policy, optimizer, args):
    torch.nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip)
    optimizer.step()


def compare(shape, world, budget, recompute):
    """Simulated and predicted GiB of one setting; the reference of the KL term is in both."""
    args = grpo.parse_args(f"--max_len 7168 --token_budget {budget} --recompute {recompute}".split())
    predicted = predict.predict_memory(shape, vars(args), 80.0, world)["training"] - predict.RESERVE
    states, peak = (size / predict.GIB for size in simulate(shape, args, world, budget))
    return {"ranks": world, "budget": budget, "recompute": recompute, "states_gib": states,
            "simulated_gib": peak, "predicted_gib": predicted, "predicted_over_simulated": predicted / peak}


def main():
    args = measure.parse("memory")
    # a count of bytes minds no other process
    result = measure.Result(args.out, "memory of an update, simulated and predicted", timed=False)
    settings = list(itertools.product((1, 0), (8, 1), (8192, 16384, 24576, 32768)))
    for recompute, world, budget in settings[:1] if args.quick else settings:
        result.add(**compare(predict.model_shape(predict.MODEL), world, budget, recompute))


if __name__ == "__main__":
    main()
