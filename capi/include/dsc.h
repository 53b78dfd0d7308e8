/* libdsc: kernel libraries of dsc, on a GPU or the CPU. Written by cbindgen from capi/src/lib.rs: do not edit. */

#ifndef DSC_H
#define DSC_H

#include <stdint.h>

// What a function returns.
typedef enum DscStatus {
  // Done.
  DSC_STATUS_OK = 0,
  // A pointer is null, a number is out of range, or a text is no UTF-8.
  DSC_STATUS_MISUSE = 1,
  // The artifact cannot be read, or is damaged, or is no kernel library.
  DSC_STATUS_ARTIFACT = 2,
  // There is no device for it, or the device refused.
  DSC_STATUS_DEVICE = 3,
  // There is no such operation.
  DSC_STATUS_NO_OPERATION = 4,
  // An argument has the wrong type, shape, strides, alignment or address.
  DSC_STATUS_ARGUMENT = 5,
  // The arguments' sizes do not fit together, or are beyond what was compiled.
  DSC_STATUS_SIZES = 6,
  // The workspace is too small.
  DSC_STATUS_WORKSPACE = 7,
  // A bug of dsc.
  DSC_STATUS_INTERNAL = 8,
} DscStatus;

// Types of elements.
typedef enum DscType {
  // Bytes: pages of a cache.
  DSC_TYPE_BYTES = 0,
  // 32-bit float.
  DSC_TYPE_F32 = 1,
  // bfloat16.
  DSC_TYPE_BF16 = 2,
  // IEEE half.
  DSC_TYPE_F16 = 3,
  // 8-bit float e4m3 (finite, with NaN).
  DSC_TYPE_E4M3 = 4,
  // 32-bit integer.
  DSC_TYPE_I32 = 5,
} DscType;

// A kernel library on a device. Any number of threads may use it at once.
typedef struct DscLibrary DscLibrary;

// An array. Its memory is that of the library's device, aligned to 16 bytes, and stays the caller's.
typedef struct DscTensor {
  // The first element.
  void *data;
  // A DscType.
  uint32_t type_;
  // Dims: at most 8.
  uint32_t rank;
  // Size of each dim.
  const int64_t *shape;
  // Distance of neighbours along each dim, in elements; null: row-major and dense.
  const int64_t *strides;
} DscTensor;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// What went wrong in the last call of this thread that did not return DSC_STATUS_OK: what it is about, and what to do. The text is
// valid until the next such call.
const char *dsc_message(void);

// Opens a kernel library that `dsc compile --kernels` wrote. One for a GPU is loaded on GPU `device`, as the CUDA driver counts, in
// its primary context, which is the one of CUDA's runtime; one for the CPU runs on as many threads as `threads` says (0: as many
// as the system grants).
//
// # Safety
// `path` is a text, `library` a place for a pointer. The file stays as it is while the library is open.
enum DscStatus dsc_library_open(const char *path,
                                uint32_t device,
                                uint32_t threads,
                                struct DscLibrary **library);

// Closes a library; null is nothing. Work that uses it must be done.
//
// # Safety
// `library` is of dsc_library_open, and not used again.
void dsc_library_close(struct DscLibrary *library);

// What the library is, as JSON: its target, the dims that it was compiled for, and each operation with arguments and limits. The
// text lives as long as the library; null for null.
//
// # Safety
// `library` is open, or null.
const char *dsc_library_describe(const struct DscLibrary *library);

// Bytes of workspace that a call of an operation with these arguments needs; their addresses are not looked at.
//
// # Safety
// `library` is open, `operation` a text, `tensors` an array of `count`, each with arrays of `rank` sizes and strides; `bytes` is a
// place for a number.
enum DscStatus dsc_workspace_bytes(const struct DscLibrary *library,
                                   const char *operation,
                                   const struct DscTensor *tensors,
                                   uint32_t count,
                                   uint64_t *bytes);

// Puts a call of an operation in the queue `stream`: a CUstream or cudaStream_t, null for the default one. Arguments are in the
// operation's order, results last. `workspace` has at least as many bytes as dsc_workspace_bytes says, is aligned to 256, and needs
// no contents.
//
// Nothing is allocated, and nothing waited for; so the call may be captured as part of a CUDA graph, which then keeps its sizes
// and addresses. A library for the CPU ignores the stream, and has done the work when this returns.
//
// # Safety
// As dsc_workspace_bytes. The arrays and the workspace are memory of the library's device until the work is done, and results
// overlap nothing else; the stream is one of the device. Calls of one opened library must not run at the same time, in two streams
// say: some kernels share memory of the library. Open it once for each stream that overlaps others.
enum DscStatus dsc_launch(const struct DscLibrary *library,
                          const char *operation,
                          const struct DscTensor *tensors,
                          uint32_t count,
                          void *workspace,
                          uint64_t workspace_bytes,
                          void *stream);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DSC_H */
