from types import SimpleNamespace

from core.train.step_times import time_table


def event(name, *, cpu=0.0, device=0.0, parent=None, wall=0.0, on="CPU", annotates=False):
    """An event of the profiler: microseconds of itself alone, and from its beginning to its end; `on` an accelerator a
    kernel, or what `annotates` several."""
    return SimpleNamespace(
        name=name,
        self_cpu_time_total=cpu,
        self_device_time_total=device,
        cpu_parent=parent,
        time_range=SimpleNamespace(elapsed_us=lambda: wall),
        device_type=f"DeviceType.{on}",
        is_user_annotation=annotates,
    )


def rows(table: str) -> dict[str, list[str]]:
    return {line[:36].strip(): line[36:].split() for line in table.splitlines()[3:]}


def test_time_is_summed_by_what_it_is_for():
    """Two steps of 10 ms; an operation inside another that is known counts as that one."""
    attention = event("aten::scaled_dot_product_attention", cpu=1000)
    steps = [event("ProfilerStep*", cpu=999, wall=10_000) for _ in (3, 4)]
    found = [
        *steps,
        attention,
        event("aten::mm", cpu=500, parent=attention),
        event("aten::mm", cpu=6000, parent=event("MmBackward0")),
        event("SoftmaxLoss", cpu=300),
        event("aten::exp", cpu=700, parent=event("SoftmaxLoss")),
        event("aten::_foreach_norm", cpu=2000),
        event("aten::add", cpu=1500),
        event("rows of the step", cpu=300),
        event("aten::copy_", cpu=100, parent=event("rows of the step")),
    ]
    assert rows(time_table(found, "steps 3 to 4")) == {
        "attention": ["0.75", "7.5%"],
        "matrix products": ["3.00", "30.0%"],
        "norms": ["0.00", "0.0%"],
        "loss": ["0.50", "5.0%"],
        "optimizer, clipping": ["1.00", "10.0%"],
        "data": ["0.20", "2.0%"],
        "communication": ["0.00", "0.0%"],
        "other operations": ["0.75", "7.5%"],
        "idle, Python between operations": ["3.80", "38.0%"],
        "a step": ["10.00"],
    }


def test_on_an_accelerator_the_kernels_count():
    step = event("ProfilerStep*", cpu=50, wall=8000)
    wait = event("rows of the step", cpu=400, wall=400)
    found = [step, wait, event("aten::mm", cpu=900, device=5000), event("nccl:all_reduce", device=1000, cpu=9)]
    table = rows(time_table(found, "step 3"))
    assert table["matrix products"] == ["5.00", "62.5%"] and table["communication"] == ["1.00", "12.5%"]
    assert table["data"] == ["0.40", "5.0%"] and table["idle, Python between operations"] == ["1.60", "20.0%"]


def test_a_kernel_is_counted_once():
    """As torch.profiler has it with CUDA: an operation's kernels are its own time, and events beside it; a step, and
    what else has a name, is one more beside them. A kernel that no operation launched is another operation."""
    found = [
        event("ProfilerStep#3", cpu=50, wall=8000),
        event("ProfilerStep#3", device=7500, on="CUDA", annotates=True),
        event("aten::mm", cpu=900, device=5000),
        event("nvjet_tst_256x128", device=5000, on="CUDA"),
        event("nccl:all_reduce", cpu=9, device=1000),
        event("nccl:all_reduce", device=1000, on="CUDA", annotates=True),
        event("ncclDevKernel_AllReduce", device=1000, on="CUDA"),
        event("triton_red_fused_0", device=500, on="CUDA"),
    ]
    table = rows(time_table(found, "step 3"))
    assert table["matrix products"] == ["5.00", "62.5%"] and table["communication"] == ["1.00", "12.5%"]
    assert table["other operations"] == ["0.50", "6.2%"]
    assert table["idle, Python between operations"] == ["1.50", "18.8%"] and table["a step"] == ["8.00"]
