/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Decodes token ids with an accelerator whose registers and memory Linux can map: /dev/uio0,
 * /dev/mem, or what a driver of the board offers.
 *
 *     cc -std=c99 -O2 -I FOLDER_OF_speq_top.h main.c speq_driver.c -o speq
 *     ./speq [-n TOKENS] [-s STOP_TOKEN]... [-t TEMPERATURE] [-r SEED] [-p] \
 *         CONTROL[@OFFSET] MEMORY[@OFFSET] ADDRESS SIZE IMAGE TOKEN...
 *
 * CONTROL and MEMORY are files to map, from an offset on: in /dev/mem the physical address, in
 * /dev/uio0 the number of the mapping times the size of a page. ADDRESS is where the accelerator
 * sees the memory, SIZE its bytes. With an interrupt, CONTROL is the UIO device that has it. The
 * mapping of MEMORY must be coherent with the accelerator, as that of /dev/mem with O_SYNC is.
 */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#include "speq_driver.h"

#define CONTROL_BYTES 4096u
#define WAIT_MS 5 /* between looks at the ring, so that tokens come one by one */
#define MAX_STOPS 8

/* What is mapped. All accesses are of 32 bits, which device memory can take. */
struct board {
    volatile uint32_t *registers, *memory;
    uint64_t address, size;
    int control, has_interrupt;
};

static int read_register(void *context, uint32_t offset, uint32_t *value)
{
    struct board *board = context;
    *value = board->registers[offset / 4];
    __sync_synchronize(); /* memory is read after it */
    return 0;
}

static int write_register(void *context, uint32_t offset, uint32_t value)
{
    struct board *board = context;
    __sync_synchronize(); /* memory has been written before it */
    board->registers[offset / 4] = value;
    return 0;
}

static volatile uint32_t *place(struct board *board, uint64_t address, size_t size)
{
    uint64_t offset = address - board->address;
    return offset <= board->size && size <= board->size - offset ? board->memory + offset / 4 : NULL;
}

static int read_memory(void *context, uint64_t address, void *data, size_t size)
{
    volatile uint32_t *words = place(context, address, size);
    for (size_t i = 0; words && i < size / 4; i++) {
        uint32_t word = words[i];
        memcpy((char *)data + 4 * i, &word, sizeof word);
    }
    return words == NULL;
}

static int write_memory(void *context, uint64_t address, const void *data, size_t size)
{
    volatile uint32_t *words = place(context, address, size);
    for (size_t i = 0; words && i < size / 4; i++) {
        uint32_t word;
        memcpy(&word, (const char *)data + 4 * i, sizeof word);
        words[i] = word;
    }
    return words == NULL;
}

static int wait_a_little(void *context)
{
    struct board *board = context;
    struct pollfd interrupt = {board->control, POLLIN, 0};
    struct timespec pause = {0, WAIT_MS * 1000000L};
    uint32_t number = 1;
    if (!board->has_interrupt)
        return nanosleep(&pause, NULL) != 0;
    if (write(board->control, &number, sizeof number) != sizeof number) /* enables it */
        return 1;
    if (poll(&interrupt, 1, WAIT_MS) > 0)
        return read(board->control, &number, sizeof number) != sizeof number;
    return 0;
}

static int read_file(void *context, uint64_t position, void *data, size_t size)
{
    FILE *file = context;
    return fseeko(file, (off_t)position, SEEK_SET) != 0 || fread(data, 1, size, file) != size;
}

static int print_token(void *context, uint32_t token)
{
    (void)context;
    return printf("%lu\n", (unsigned long)token) < 0 || fflush(stdout) != 0;
}

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "speq: %s: %s\n", what, why);
    exit(1);
}

static unsigned long long number(const char *text, unsigned long long most)
{
    char *end;
    unsigned long long value = strtoull(text, &end, 0);
    if (*text < '0' || *text > '9' || *end || value > most)
        fail(text, "expected a number that is not too large");
    return value;
}

/* Map FILE[@OFFSET]; the file is left open. */
static volatile uint32_t *map(char *name, uint64_t size, int *file)
{
    char *at = strrchr(name, '@');
    off_t offset = at ? (off_t)number(at + 1, INT64_MAX) : 0;
    void *place;
    if (at)
        *at = 0;
    *file = open(name, O_RDWR | O_SYNC);
    if (*file < 0)
        fail(name, "cannot be opened for reading and writing");
    place = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, *file, offset);
    if (place == MAP_FAILED)
        fail(name, "cannot be mapped: offset and size must be right, and the rights there");
    return place;
}

int main(int argc, char **argv)
{
    static struct speq speq;
    static uint32_t stops[MAX_STOPS];
    struct board window = {0};
    struct speq_board board = {&window, read_register, write_register, read_memory, write_memory,
                               wait_a_little};
    struct speq_run run = {0};
    struct speq_file file = {0};
    uint32_t *prompt;
    FILE *image;
    off_t size;
    int option, result, memory;
    run.max_tokens = 32;
    run.stops = stops;
    while ((option = getopt(argc, argv, "n:s:t:r:p")) != -1) {
        if (option == 'n')
            run.max_tokens = (uint32_t)number(optarg, UINT32_MAX);
        else if (option == 's' && run.stop_count < MAX_STOPS)
            stops[run.stop_count++] = (uint32_t)number(optarg, UINT32_MAX);
        else if (option == 't')
            run.sample = 1, run.temperature = strtod(optarg, NULL);
        else if (option == 'r')
            run.seed = number(optarg, UINT64_MAX);
        else if (option == 'p')
            run.plain = 1;
        else
            fail(argv[0], "no such option, or too many stop tokens; main.c has the usage");
    }
    argv += optind, argc -= optind;
    if (argc < 6)
        fail("usage", "CONTROL[@OFFSET] MEMORY[@OFFSET] ADDRESS SIZE IMAGE TOKEN...");
    window.address = number(argv[2], UINT64_MAX);
    window.size = number(argv[3], SIZE_MAX);
    window.has_interrupt = strncmp(argv[0], "/dev/uio", 8) == 0;
    window.registers = map(argv[0], CONTROL_BYTES, &window.control);
    window.memory = map(argv[1], window.size, &memory);
    image = fopen(argv[4], "rb");
    if (!image || fseeko(image, 0, SEEK_END) || (size = ftello(image)) < 0)
        fail(argv[4], speq_message(SPEQ_FILE_FAILED));
    file.context = image;
    file.size = (uint64_t)size;
    file.read = read_file;
    result = speq_load(&speq, &board, &file, window.address, window.size);
    if (result != SPEQ_OK)
        fail(argv[4], speq_message(result));
    run.length = (uint32_t)(argc - 5);
    prompt = malloc(run.length * sizeof *prompt);
    if (!prompt)
        fail("prompt", "no memory for it");
    for (uint32_t i = 0; i < run.length; i++)
        prompt[i] = (uint32_t)number(argv[5 + i], UINT32_MAX);
    run.prompt = prompt;
    result = speq_generate(&speq, &run, print_token, NULL);
    if (result == SPEQ_RUN_FAILED)
        fail(speq_message(result), speq_error_name(speq.error));
    if (result != SPEQ_OK)
        fail("decoding", speq_message(result));
    free(prompt);
    return 0;
}
