/* Calls one operation of a kernel library from C: the exact top-k of some scores.
 *
 *   dsc compile --kernels dsa --target cpu --top-k 8 -o dsa.dsc
 *   cargo build --release --package dsc-capi && cp target/release/libdsc_capi.so libdsc.so
 *   cc -I capi/include examples/c/topk.c -L . -l dsc -o topk
 *   LD_LIBRARY_PATH=. ./topk dsa.dsc 8
 *
 * A library for a GPU is called the same way, with device pointers, a workspace in device memory and a stream.
 */
#include "dsc.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 3, COLUMNS = 100 };

static void check(int32_t status) {
    if (status != DSC_STATUS_OK) {
        fprintf(stderr, "dsc: %s\n", dsc_message());
        exit(1);
    }
}

/* Memory that both arrays and workspaces may have. */
static void *memory(size_t bytes) {
    return aligned_alloc(256, (bytes + 256) / 256 * 256);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s LIBRARY.dsc K\n", argv[0]);
        return 2;
    }
    int64_t k = atoi(argv[2]);
    DscLibrary *library = NULL;
    check(dsc_library_open(argv[1], 0, 1, &library));

    float *logits = memory(ROWS * COLUMNS * sizeof *logits);
    int32_t *ends = memory(ROWS * sizeof *ends);
    int32_t *selected = memory(ROWS * k * sizeof *selected);
    for (int row = 0; row < ROWS; row++) {
        ends[row] = row == 2 ? 5 : COLUMNS;
        for (int i = 0; i < COLUMNS; i++)
            logits[row * COLUMNS + i] = (float)((i * 37 + row * 11) % COLUMNS);
    }

    int64_t matrix[] = {ROWS, COLUMNS}, vector[] = {ROWS}, result[] = {ROWS, k};
    DscTensor arguments[] = {
        {logits, DSC_TYPE_F32, 2, matrix, NULL},
        {ends, DSC_TYPE_I32, 1, vector, NULL},
        {selected, DSC_TYPE_I32, 2, result, NULL},
    };
    uint64_t bytes = 0;
    check(dsc_workspace_bytes(library, "topk_decode", arguments, 3, &bytes));
    check(dsc_launch(library, "topk_decode", arguments, 3, memory(bytes), bytes, NULL));

    for (int row = 0; row < ROWS; row++) {
        for (int64_t i = 0; i < k; i++)
            printf(" %d", selected[row * k + i]);
        printf("\n");
    }

    /* What is wrong is said, and nothing runs. */
    ends = NULL;
    arguments[1].data = NULL;
    int32_t status = dsc_launch(library, "topk_decode", arguments, 3, memory(bytes), bytes, NULL);
    printf("%d: %s\n", status, dsc_message());
    dsc_library_close(library);
    return 0;
}
