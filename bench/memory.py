"""memory.py - memory of an update of the 1.5B model without a card, beside what schedule.py predicts.

    python bench/memory.py                          # all settings: 8 and 1 rank, four budgets; minutes on a CPU
    python bench/memory.py --quick                  # one setting, about 15 seconds

Policy, frozen reference, FSDP2, checkpointing and AdamW run as in grpo.py, on tensors that have shapes but no
contents (FakeTensorMode) in a process group that sends nothing. What is counted is the bytes of all storages
that are alive, one rank's; the peak is that of a second update, when Adam's moments are there. The device is
called "cpu", but policy.py is made to take its CUDA branches (bf16 products, one tile of logits a block, the
varlen attention kernel with the tensors it keeps). Not in it: CUDA context, NCCL's buffers, fragmentation and
workspaces inside kernels, for which schedule.py adds RESERVE.
"""
import argparse
import gc
import sys
import time
import weakref
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure  # puts the project on the path

import grpo
import policy as policy_lib
import schedule

BUDGETS = (8192, 16384, 24576, 32768)
DOCUMENT, PROMPT = 8192, 150  # tokens of a full sequence, and of the prompt in it


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that still live: .now, .peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        self.resize_plainly = torch.UntypedStorage.resize_

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor calls its local operation, which comes here again
        result = func(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        return result

    def count(self, storage):
        """A storage that is new or has another size than before."""
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self.forget, key)
        self.change(key, storage.nbytes())

    def change(self, key, size):
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __enter__(self):
        def resize(storage, size):  # FSDP frees gathered weights this way, without an operation
            self.resize_plainly(storage, size)
            self.count(storage)

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize_plainly
        return super().__exit__(*error)


@contextmanager
def simulated(world):
    """Inside, tensors are empty and count as a card's for policy.py, and this process is rank 0 of `world`."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    mesh = dist.init_device_mesh("cpu", (world,))  # it reads its ranks, which a tensor without values refuses
    try:
        with (mock.patch.object(dist.device_mesh, "init_device_mesh", lambda *_, **__: mesh),
              FakeTensorMode(), LiveBytes() as live, mock.patch.object(FakeTensor, "is_cuda", True),
              mock.patch.object(policy_lib.Policy, "_check", use_varlen)):
            yield live
    finally:
        dist.destroy_process_group()


def use_varlen(policy):
    """In place of Policy._check, which looks at values: only what it sets."""
    policy_lib.AttentionInterface.register("varlen", policy_lib.varlen_attention)
    policy.model.set_attn_implementation("varlen")


def make_policy(shape, recompute, dtype):
    config = Qwen2Config(
        hidden_size=shape["hidden"], intermediate_size=shape["mlp"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["q"] // 128, num_key_value_heads=shape["kv"] // 128,
        vocab_size=shape["vocab"], tie_word_embeddings=shape["tied"],
        max_position_embeddings=shape["positions"])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return policy_lib.Policy(model, recompute).shard(torch.bfloat16)


def simulate(shape, args, world, budget):
    """Scores and the last micro-batch of an update, then its optimizer step -> bytes (before, peak) of a rank."""
    with simulated(world) as live:
        policy = make_policy(shape, args.recompute, torch.float32)
        reference = make_policy(shape, False, torch.bfloat16).requires_grad_(False)
        optimizer = torch.optim.AdamW(policy.parameters(), args.lr, fused=True)
        for p in policy.parameters():  # gradients of the micro-batches before this one
            p.grad = torch.zeros_like(p)
        step(policy, optimizer, args)  # Adam's moments; DTensor learns its shapes, on tensors of full size
        documents = max(1, budget // DOCUMENT)
        response = [1] * (budget // documents - PROMPT)
        micro = policy_lib.pack_row([([i] * PROMPT, response) for i in range(documents)])
        gc.collect()
        states, live.peak = live.now, live.now
        with torch.no_grad():
            scored = reference(micro, args.temperature)[0]
            reference.reshard()
        logp, entropy = policy(micro, args.temperature, entropy_grad=args.entropy_coef != 0)
        loss, _ = grpo.grpo_loss(
            logp, scored, torch.ones(documents), micro.lengths, ref_logp=scored, entropy=entropy,
            clip_low=args.clip_low, clip_high=args.clip_high, kl_coef=args.kl_coef,
            entropy_coef=args.entropy_coef, total=len(logp))
        (loss * policy.grad_divisor).backward()
        step(policy, optimizer, args)
        return states, live.peak


def step(policy, optimizer, args):
    torch.nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip)
    optimizer.step()


def row(world, budget, recompute):
    """Simulated and predicted GiB of one setting; the reference of the KL term is in both."""
    words = f"--max_len {DOCUMENT - 1024} --max_prompt_len 1024 --token_budget {budget}"
    args = grpo.parse_args([*words.split(), "--recompute", str(recompute)])
    shape = schedule.model_shape(schedule.MODEL)
    predicted = schedule.predict(shape, vars(args), 80.0, world)
    began = time.perf_counter()
    states, peak = (size / schedule.GIB for size in simulate(shape, args, world, budget))
    said = predicted["training"] - schedule.RESERVE
    return {"side": f"{world} x {budget} x {recompute}", "ranks": world, "budget": budget,
            "recompute": recompute, "states_gib": states, "simulated_gib": peak, "predicted_gib": said,
            "predicted_over_simulated": said / peak, "seconds": time.perf_counter() - began}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one setting: 8 ranks, 8,192 tokens, recomputation")
    add("--out", default=str(measure.RESULTS / "memory.json"), help="JSON to write")
    args = parser.parse_args(argv)
    before = {"busy_cores": None, "time": time.time()}  # a count of bytes minds no other process
    settings = [(world, budget, recompute) for recompute in (1, 0) for world in (8, 1) for budget in BUDGETS]
    rows = []
    print("ranks  budget  recompute  simulated  predicted  (GiB)   ratio  seconds")
    for setting in settings[:1] if args.quick else settings:
        rows.append(row(*setting))
        print("{ranks:5d} {budget:7,d} {recompute:10d} {simulated_gib:10.2f} {predicted_gib:10.2f} "
              "{predicted_over_simulated:15.3f} {seconds:8.0f}".format(**rows[-1]), flush=True)
    measure.write(args, "memory of an update, simulated and predicted", rows, before,
                  reserve_gib=schedule.RESERVE)


if __name__ == "__main__":
    main()
