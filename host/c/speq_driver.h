/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Driver in C99 of SPEQ accelerators with a vector unit, without allocation or dependencies: loads
 * an image (docs/image.md) into the accelerator's memory and decodes text with it. Registers, memory
 * and the image's file are reached by the caller's functions, which return 0 unless they fail.
 */
#ifndef SPEQ_DRIVER_H
#define SPEQ_DRIVER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What functions return, and what speq_message says of it. */
#define SPEQ_RESULTS(X) \
    X(OK, "no error") \
    X(CANCELLED, "the function that takes the tokens has ended the run") \
    X(BOARD_FAILED, "the board does not answer") \
    X(FILE_FAILED, "the image cannot be read") \
    X(NO_IMAGE, "the file is no image of this version: make one with speq image") \
    X(DAMAGED, "the image is damaged: copy it again, or make it again with speq image") \
    X(OTHER_BOARD, "the image is for another accelerator: make one with speq image --config") \
    X(BAD_ADDRESS, "the load address is not aligned as the image demands, or has too many bits") \
    X(NO_ROOM, "the memory is too small for the image") \
    X(NOT_LOADED, "no image has been loaded") \
    X(BAD_PROMPT, "the prompt is empty, too long or has a token that the model has not") \
    X(BAD_SETTING, "no token to decode, too many stop tokens, or a temperature not above 0") \
    X(HANGS, "the accelerator does not stop, perhaps memory does not answer: reset it") \
    X(UNEXPECTED, "the accelerator has a state that no run of this driver has, or gives no tokens") \
    X(RUN_FAILED, "the run has ended with an error of the accelerator")
#define SPEQ_RESULT(name, message) SPEQ_##name,
enum speq_result { SPEQ_RESULTS(SPEQ_RESULT) SPEQ_RESULT_COUNT };

/* An accelerator, and the memory that it shares with the host, at the addresses that it sees; all
 * places and sizes in memory are multiples of 4. What is written before a register must be seen by
 * the accelerator after it. `wait` returns after an interrupt, or earlier; it may be NULL. */
struct speq_board {
    void *context; /* given to each function */
    int (*read_register)(void *context, uint32_t offset, uint32_t *value);
    int (*write_register)(void *context, uint32_t offset, uint32_t value);
    int (*read_memory)(void *context, uint64_t address, void *data, size_t size);
    int (*write_memory)(void *context, uint64_t address, const void *data, size_t size);
    int (*wait)(void *context);
};

/* The image's file, of which `read` gives `size` bytes from `position` on. */
struct speq_file {
    void *context;
    uint64_t size;
    int (*read)(void *context, uint64_t position, void *data, size_t size);
};

/* An accelerator with a model. */
struct speq {
    struct speq_board board;
    uint32_t vocabulary, context, capacity; /* tokens, positions, entries of the KV cache */
    uint32_t known;                         /* tokens of the text whose entries are in it */
    uint32_t error;                         /* of the last run that failed, SPEQ_ERROR_ */
    uint64_t error_address;
    uint64_t text, ring; /* from here on the driver's own */
    uint32_t ring_tokens, draft_length, history, rows;
    unsigned char buffer[4096];
};

/* What to decode. Zeros mean greedy decoding. */
struct speq_run {
    const uint32_t *prompt; /* token ids */
    uint32_t length;        /* of the prompt, at least 1 */
    uint32_t resume;        /* its first tokens that are also those of the last run's text */
    uint32_t max_tokens;    /* at least 1; fewer are decoded if context or KV cache end */
    const uint32_t *stops;  /* token ids behind which nothing follows */
    uint32_t stop_count;    /* of them, up to 8 */
    int plain;              /* decode without drafts: the same tokens, more slowly */
    int sample;             /* with this temperature and seed */
    double temperature;
    uint64_t seed;
    int truncate; /* to tokens whose logit is at least the largest plus cutoff */
    float cutoff; /* of min-p sampling: temperature * ln(min-p) */
};

/* Takes a token; anything but 0 ends the run. */
typedef int (*speq_token)(void *context, uint32_t token);

const char *speq_message(int result);      /* a line that says what a result means */
const char *speq_error_name(uint32_t error); /* of an error of a run */

/* Load an image behind address `base`, where it may use `size` bytes. Nothing is written before all
 * of it has been compared with its checksums and with the accelerator. */
int speq_load(struct speq *speq, const struct speq_board *board, const struct speq_file *file,
              uint64_t base, uint64_t size);

/* Decode, and give each token to `token` as it is committed. The accelerator is idle when this
 * returns, but for SPEQ_BOARD_FAILED and SPEQ_HANGS. */
int speq_generate(struct speq *speq, const struct speq_run *run, speq_token token, void *context);

#ifdef __cplusplus
}
#endif

#endif
