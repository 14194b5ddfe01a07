"""How the actor's weights reach every engine: one transport per file, all with the same three verbs.

    gloo   engines on CPUs: a process group of its own, broadcast from the actor's rank 0
    nccl   engines on their own GPUs: vLLM's NCCL engine, broadcast from the actor's rank 0
    ipc    engines on the actor's GPUs: vLLM's IPC engine, memory handles through a mailbox

Who waits for whom. ``open`` (actor) and ``join_weights`` (engine) wait for nobody: they exchange an
``Address``. The group itself comes together in the first ``send`` and the first ``receive_weights``, which
the driver calls at the same time:

    actor rank 0    send:             [flatten 0] [flatten 1] [flatten 2]        -> receipt
                                          |  \\bucket 0  \\bucket 1  \\bucket 2
    vLLM worker k   receive_weights:  pause  [load 0]   [load 1]   [load 2]  resume -> receipt

Every bucket is a broadcast, so the sender waits for the slowest worker and a worker for the sender; the other
ranks of the actor wait only inside the iteration (ZeRO-3 gathers each tensor on all of them). A side that
never comes, or that expects other tensors, ends the wait of the rest after ``timeout_s`` with an error (NCCL
itself has no limit: there the driver's deadline ends the call). After a failed sync the group is out of step
and the model half loaded: open again, restart the engine. A restarted actor or engine needs a new ``open``
and a new ``join_weights`` on every engine; both replace what was there.

Names are those of Transformers; a tied ``lm_head`` is not sent twice. Both ends plan the same buckets from
the address. Only the files that run inside a vLLM worker, and the GPU senders, import vllm; the gloo sender
does not.
"""
