"""Sparse-attention kernels that dsc compiled ahead of time, on torch tensors.

    import dsc_kernels
    dsa = dsc_kernels.open("dsa.dsc")            # or dsc_kernels.open(): the one in the wheel
    out, lse = dsa.mla_decode(q, cache, indices)

Nothing is compiled on this machine: a `.dsc` file holds machine code, and `libdsc` launches it on torch's current stream.
No call waits for the GPU. Calls may be captured in a CUDA graph, which then keeps the sizes and addresses they had.

A library is compiled for one set of dims (heads, top-k, softmax scale, ...): see `Library.facts`. Shapes below use its names:
T tokens, S sequences, H heads, Hi index heads, D index dim, L latent, R rope, k top-k, C columns. Integers are int32, and
every tensor is contiguous, except that rows of `logits` and of `page_table` may be further apart.
"""

import ctypes
import json
import os

__all__ = ["Array", "DscError", "Library", "open"]

_BYTES, _F32, _BF16, _F16, _E4M3, _I32 = range(6)
_TYPES = {
    "uint8": _BYTES, "float32": _F32, "bfloat16": _BF16, "float16": _F16, "float8_e4m3fn": _E4M3, "int32": _I32,
}
_SIZES = {"uint8": 1, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int32": 4}


class DscError(RuntimeError):
    """A call that libdsc refused; `status` is its DscStatus."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_uint32), ("rank", ctypes.c_uint32),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64))]


class Array:
    """Memory of the CPU with the few members of a torch tensor that this module uses; for programs without torch."""

    def __init__(self, shape, dtype, data=None):
        self.shape, self.dtype, self.device = tuple(shape), dtype, "cpu"
        self.nbytes = _SIZES[dtype]
        for n in self.shape:
            self.nbytes *= n
        self._memory = ctypes.create_string_buffer(self.nbytes + 256)
        if data is not None:
            ctypes.memmove(self.data_ptr(), bytes(data), self.nbytes)

    def data_ptr(self):
        return (ctypes.addressof(self._memory) + 255) // 256 * 256

    def stride(self):
        strides, step = [], 1
        for n in reversed(self.shape):
            strides.insert(0, step)
            step *= n
        return tuple(strides)

    def tobytes(self):
        return ctypes.string_at(self.data_ptr(), self.nbytes)


def _load():
    """libdsc: DSC_LIBRARY names it, else it is the wheel's."""
    path = os.environ.get("DSC_LIBRARY") or os.path.join(os.path.dirname(os.path.abspath(__file__)), "libdsc.so")
    dll = ctypes.CDLL(path)
    p, u32, u64, s = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p
    dll.dsc_message.argtypes, dll.dsc_message.restype = [], s
    dll.dsc_library_open.argtypes = [s, u32, u32, ctypes.POINTER(p)]
    dll.dsc_library_close.argtypes, dll.dsc_library_close.restype = [p], None
    dll.dsc_library_describe.argtypes, dll.dsc_library_describe.restype = [p], s
    dll.dsc_workspace_bytes.argtypes = [p, s, ctypes.POINTER(_Tensor), u32, ctypes.POINTER(u64)]
    dll.dsc_launch.argtypes = [p, s, ctypes.POINTER(_Tensor), u32, p, u64, p]
    for name in ("dsc_library_open", "dsc_workspace_bytes", "dsc_launch"):
        getattr(dll, name).restype = ctypes.c_int32
    return dll


_dll = None


def open(path=None, device=0, threads=0):
    """The kernel library in the file `path`; without one, the `dsa.dsc` beside this module. `device` is the number of the GPU, if the
    library is for one; `threads` those of the CPU, if it is for that (0: all)."""
    return Library(path or os.path.join(os.path.dirname(os.path.abspath(__file__)), "dsa.dsc"), device, threads)


class Library:
    """An open kernel library. Its methods give new tensors, or write those given as `out` and the like."""

    def __init__(self, path, device=0, threads=0):
        global _dll
        self._handle = ctypes.c_void_p()
        if _dll is None:
            _dll = _load()
        self._check(_dll.dsc_library_open(os.fsencode(path), device, threads, ctypes.byref(self._handle)))
        about = json.loads(_dll.dsc_library_describe(self._handle))
        #: Dims it was compiled for: heads, index_heads, index_dim, latent, rope, topk, scale, queries, max_context, fp8_cache.
        self.facts = about["library"]
        #: Such as sm_90a.
        self.target = about["target"]
        #: Each operation and shape class: names, types and shapes of arguments, largest sizes, launches.
        self.entries = about["entries"]
        self._gpu = device if about["gpu"] else None

    def close(self):
        if self._handle:
            _dll.dsc_library_close(self._handle)
            self._handle = ctypes.c_void_p()

    def __del__(self):
        if _dll is not None and getattr(self, "_handle", None):
            self.close()

    # ---- any operation, by name ----

    def workspace_bytes(self, operation, tensors):
        """Bytes of workspace that `launch` needs with these tensors."""
        array, keep = self._arguments(tensors)
        return self._workspace_bytes(operation.encode(), array, len(tensors))

    def launch(self, operation, tensors, workspace=None, stream=None):
        """Puts an operation in a stream (torch's current one, if None): `tensors` are its arguments in order, results last (see
        `entries`). Without a `workspace` (uint8, aligned to 256 bytes) one is taken from torch's allocator."""
        array, keep = self._arguments(tensors)
        name = operation.encode()
        need = self._workspace_bytes(name, array, len(tensors))
        if workspace is None and need:
            workspace = self._empty((need,), "uint8", tensors[0])
        pointer, have = (workspace.data_ptr(), _bytes(workspace)) if workspace is not None else (None, 0)
        if stream is None and self._gpu is not None:
            import torch
            stream = torch.cuda.current_stream(self._gpu).cuda_stream
        self._check(_dll.dsc_launch(self._handle, name, array, len(tensors), pointer, have, stream))

    # ---- the operations ----

    def paged_logits(self, q, cache, weights, ends, page_table, width=None, out=None):
        """Index scores of paged keys: `out[t, s] = scale_s * sum_h max(q[t, h] . k[s], 0) * weights[t, h]` for s < ends[t].
        Other columns are not written.

        q [S, n, Hi, D] or [T, Hi, D] float8_e4m3fn (its scale is in the weights), cache [N, 64, 1, D + 4] uint8 (each page: 64 x D codes,
        then 64 float32 scales), weights [T, Hi] float32, ends [T] or [S, n] (keys that each token sees), page_table [S, P].
        Returns float32 [T, width]; `width` is 64 P if not given."""
        q = q.reshape(-1, *q.shape[-2:])
        if out is None:
            out = self._empty((q.shape[0], width or 64 * page_table.shape[1]), "float32", q)
        self.launch("paged_logits", [q, weights, _pages(cache), ends.reshape(-1), page_table, out])
        return out

    def ragged_logits(self, q, keys, scales, weights, starts, ends, out=None):
        """Index scores of keys in a matrix, for columns starts[t] <= s < ends[t]; others are not written.

        q [T, Hi, D] and keys [C, D] float8_e4m3fn, scales [C] and weights [T, Hi] float32. Returns float32 [T, C]."""
        if out is None:
            out = self._empty((q.shape[0], keys.shape[0]), "float32", q)
        self.launch("ragged_logits", [q, weights, keys, scales.reshape(-1, 1), starts, ends, out])
        return out

    def topk_decode(self, logits, ends, out=None):
        """The columns of the k largest of logits[t, :ends[t]]: int32 [T, k], ascending, -1 behind the last. Exact; among equals the
        lowest columns. -inf is never selected."""
        if out is None:
            out = self._empty((logits.shape[0], self.facts["topk"]), "int32", logits)
        self.launch("topk_decode", [logits, ends, out])
        return out

    def topk_prefill(self, logits, starts, ends, out=None):
        """As `topk_decode`, of the columns starts[t]..ends[t]; they are numbered from 0, not from starts[t]."""
        if out is None:
            out = self._empty((logits.shape[0], self.facts["topk"]), "int32", logits)
        self.launch("topk_prefill", [logits, starts, ends, out])
        return out

    def mla_decode(self, q, cache, indices, out=None, lse=None):
        """Attention over selected slots of a paged latent cache.

        q [S, n, H, L + R] or [T, H, L + R] bfloat16; cache [N, 64, 1, 656] uint8 (at 512 + 64: 512 e4m3 codes, 4 float32 scales, 64
        bfloat16), or bfloat16 [N, 64, 1, L + R] if the library is compiled for that; indices [.., k]: page * 64 + offset, -1 for none.
        Returns (out bfloat16, as q with L columns; lse float32, as q without them: natural logarithm, +inf where nothing is
        selected, and out is 0)."""
        return self._attend("mla_decode", q, [_pages(cache), indices.reshape(-1, indices.shape[-1])], out, [lse])

    def mla_prefill(self, q, kv, indices, out=None, max_logits=None, lse=None):
        """Attention over selected rows of a matrix of keys: kv [C, 1, L + R] or [C, L + R] bfloat16, indices [T, 1, k] or [T, k].
        Returns (out, max_logits, lse)."""
        kv, indices = kv.reshape(-1, kv.shape[-1]), indices.reshape(-1, indices.shape[-1])
        out, lse, max_logits = self._attend("mla_prefill", q, [kv, indices], out, [lse, max_logits])
        return out, max_logits, lse

    def decode(self, index_q, index_cache, weights, ends, page_table, q, cache, out=None, lse=None):
        """The whole chain of a decode step: `paged_logits`, `topk_decode` and `mla_decode` over the selected keys; the page table
        is that of both caches. Returns (out, lse)."""
        index_q = index_q.reshape(-1, *index_q.shape[-2:])
        before = [index_q, weights, _pages(index_cache), ends.reshape(-1), page_table]
        return self._attend("decode", q, [_pages(cache)], out, [lse], before)

    def prefill(self, index_q, keys, scales, weights, starts, ends, q, kv, out=None, lse=None):
        """The whole chain of a prefill chunk: `ragged_logits`, `topk_prefill` and `mla_prefill`. Returns (out, lse)."""
        before = [index_q, weights, keys, scales.reshape(-1, 1), starts, ends]
        return self._attend("prefill", q, [kv.reshape(-1, kv.shape[-1])], out, [lse], before)

    # ---- inside ----

    def _attend(self, operation, q, others, out, further, before=()):
        rows = q.reshape(-1, *q.shape[-2:])
        if out is None:
            out = self._empty((*q.shape[:-1], self.facts["latent"]), "bfloat16", q)
        further = [self._empty(q.shape[:-1], "float32", q) if f is None else f for f in further]
        results = [out.reshape(rows.shape[0], rows.shape[1], -1), *(f.reshape(rows.shape[:2]) for f in further)]
        self.launch(operation, [*before, rows, *others, *results])
        return (out, *further)

    def _empty(self, shape, dtype, like):
        if isinstance(like, Array):
            return Array(shape, dtype)
        import torch
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)

    def _workspace_bytes(self, name, array, count):
        need = ctypes.c_uint64()
        self._check(_dll.dsc_workspace_bytes(self._handle, name, array, count, ctypes.byref(need)))
        return need.value

    def _arguments(self, tensors):
        array, keep = (_Tensor * len(tensors))(), []
        for i, (slot, t) in enumerate(zip(array, tensors)):
            dtype = str(t.dtype).removeprefix("torch.")
            if dtype not in _TYPES:
                raise TypeError(f"argument {i} is {dtype}, which no kernel takes")
            self._place(i, t)
            rank = len(t.shape)
            shape, strides = (ctypes.c_int64 * rank)(*t.shape), (ctypes.c_int64 * rank)(*t.stride())
            keep += [shape, strides]
            slot.data, slot.type, slot.rank = t.data_ptr(), _TYPES[dtype], rank
            slot.shape, slot.strides = shape, strides
        return array, keep

    def _place(self, i, t):
        """Refuses a tensor that is not where the kernels run."""
        kind = getattr(t.device, "type", "cpu")
        index = getattr(t.device, "index", None)
        if (kind != "cuda") if self._gpu is not None else (kind != "cpu"):
            raise ValueError(f"argument {i} is on {t.device}, the library is for {self.target}")
        if self._gpu is not None and index not in (None, self._gpu):
            raise ValueError(f"argument {i} is on {t.device}, the library is open on GPU {self._gpu}")

    def _check(self, status):
        if status:
            raise DscError(status, _dll.dsc_message().decode(errors="replace"))


def _bytes(t):
    return t.nbytes


def _pages(cache):
    """Pages of a cache as rows of bytes."""
    if isinstance(cache, Array):
        return cache
    import torch
    pages = cache.view(torch.uint8)
    return pages.reshape(pages.shape[0], -1)
