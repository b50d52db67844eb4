/* SPDX-License-Identifier: Apache-2.0 */
#include "speq_driver.h"

#include <string.h>

/* The header that speq verilog writes beside the accelerator. */
#ifndef SPEQ_HEADER
#define SPEQ_HEADER "speq_top.h"
#endif
#include SPEQ_HEADER
#ifndef SPEQ_RUN_MOVE_MASK
#error "this driver is for accelerators with a vector unit: speq verilog without --lanes 0"
#endif

#define IMAGE_VERSION 1u
#define HEADER_BYTES 176u
#define REGION_BYTES 64u
#define REGISTER_BYTES 16u
#define WORD_BYTES 8u /* of a relocation, and of what it is of */
#define TOKEN_BYTES 4u
#define KIND_TEXT 16u         /* of the region with the text's tokens */
#define STOP_READS 100000     /* of STATUS, after which an accelerator counts as hanging */
enum action { EXPECT, WRITE, WRITE_ADDRESS }; /* what is done with a register */

/* Return what is not SPEQ_OK; the same for a function of the board of `s`. */
#define TRY(call) do { int result_ = (call); if (result_ != SPEQ_OK) return result_; } while (0)
#define BOARD(f, ...) TRY(s->board.f(s->board.context, __VA_ARGS__) ? SPEQ_BOARD_FAILED : SPEQ_OK)
#define FIELD(name, content) (((content) & SPEQ_##name##_MASK) >> SPEQ_##name##_SHIFT)

const char *speq_message(int result)
{
#define MESSAGE(name, message) message,
    static const char *const messages[] = {SPEQ_RESULTS(MESSAGE)};
    return result >= 0 && result < SPEQ_RESULT_COUNT ? messages[result] : "unknown result";
}

const char *speq_error_name(uint32_t error)
{
    static const char *const names[] = {SPEQ_ERROR_NAMES};
    return error < sizeof names / sizeof *names ? names[error] : "unknown error";
}

/* Numbers in memory and files are little-endian, whatever the host is. */

static uint32_t number32(const unsigned char *bytes)
{
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static uint64_t number64(const unsigned char *bytes)
{
    return number32(bytes) | (uint64_t)number32(bytes + 4) << 32;
}

static void put(unsigned char *bytes, uint64_t value, unsigned size)
{
    for (unsigned i = 0; i < size; i++)
        bytes[i] = (unsigned char)(value >> 8 * i);
}

/* Registers. */

static int get(struct speq *s, uint32_t offset, uint32_t *value)
{
    BOARD(read_register, offset, value);
    return SPEQ_OK;
}

static int get64(struct speq *s, uint32_t offset, uint64_t *value)
{
    uint32_t low, high;
    TRY(get(s, offset, &low));
    TRY(get(s, offset + 4, &high));
    *value = low | (uint64_t)high << 32;
    return SPEQ_OK;
}

static int set(struct speq *s, uint32_t offset, uint32_t value)
{
    BOARD(write_register, offset, value);
    return SPEQ_OK;
}

static int set64(struct speq *s, uint32_t offset, uint64_t value)
{
    TRY(set(s, offset, (uint32_t)value));
    return set(s, offset + 4, (uint32_t)(value >> 32));
}

/* Bring the accelerator to IDLE, whatever it is doing. */
static int stop(struct speq *s)
{
    uint32_t state;
    for (int i = 0; i < STOP_READS; i++) {
        TRY(get(s, SPEQ_REG_STATUS, &state));
        if (state == SPEQ_STATE_IDLE)
            return SPEQ_OK;
        if (i == 0 || state == SPEQ_STATE_ERROR)
            TRY(set(s, SPEQ_REG_CONTROL, SPEQ_CONTROL_STOP_MASK));
    }
    return SPEQ_HANGS;
}

/* Loading: all tables are gone through to compare everything, and again, with `writes`. */

struct image {
    const struct speq_file *file;
    uint64_t base, memory_bytes;
    uint32_t regions, registers, relocations, alignment;
    int writes;
};

static int read_file(const struct image *image, uint64_t position, void *data, size_t size)
{
    const struct speq_file *file = image->file;
    if (position > file->size || size > file->size - position)
        return SPEQ_DAMAGED;
    return file->read(file->context, position, data, size) ? SPEQ_FILE_FAILED : SPEQ_OK;
}

/* A piece of the file, CRC-32 of which is given; with `writes` it is written to memory. */
static int load_piece(struct speq *s, const struct image *image, uint64_t position, uint64_t size,
                      uint32_t expected, int writes, uint64_t address)
{
    static const uint32_t table[] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
        0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
        0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
    };
    uint32_t crc = 0xffffffffu;
    while (size) {
        size_t part = size < sizeof s->buffer ? (size_t)size : sizeof s->buffer;
        TRY(read_file(image, position, s->buffer, part));
        for (size_t i = 0; i < part; i++) {
            crc ^= s->buffer[i];
            crc = table[crc & 15] ^ crc >> 4;
            crc = table[crc & 15] ^ crc >> 4;
        }
        if (writes)
            BOARD(write_memory, address, s->buffer, part);
        position += part, address += part, size -= part;
    }
    return ~crc == expected ? SPEQ_OK : SPEQ_DAMAGED;
}

static int load_header(struct speq *s, struct image *image)
{
    unsigned char h[HEADER_BYTES];
    uint64_t end = HEADER_BYTES;
    TRY(read_file(image, 0, h, sizeof h));
    if (memcmp(h, "SPEQIMG", 8) || number32(h + 8) != IMAGE_VERSION)
        return SPEQ_NO_IMAGE;
    if (number32(h + 40) < HEADER_BYTES)
        return SPEQ_DAMAGED;
    TRY(load_piece(s, image, 16, number32(h + 40) - 16, number32(h + 12), 0, 0));
    image->memory_bytes = number64(h + 24);
    end += (uint64_t)REGION_BYTES * (image->regions = number32(h + 44));
    end += (uint64_t)REGISTER_BYTES * (image->registers = number32(h + 48));
    end += (uint64_t)WORD_BYTES * (image->relocations = number32(h + 52));
    image->alignment = number32(h + 56);
    s->capacity = number32(h + 60);
    s->vocabulary = number32(h + 64);
    s->context = number32(h + 68);
    return end == number32(h + 40) && number64(h + 16) == image->file->size &&
           image->memory_bytes >= WORD_BYTES && image->alignment &&
           image->alignment % WORD_BYTES == 0 ? SPEQ_OK : SPEQ_DAMAGED;
}

static int load_register(struct speq *s, const struct image *image, const unsigned char *entry)
{
    uint32_t offset = number32(entry), action = number32(entry + 4), found;
    uint64_t value = number64(entry + 8);
    if (action == EXPECT) {
        TRY(get(s, offset, &found));
        return found == value ? SPEQ_OK : SPEQ_OTHER_BOARD;
    }
    if (action > WRITE_ADDRESS || offset % 4 || offset > SPEQ_REG_ROW_TOKEN)
        return SPEQ_DAMAGED;
    if (image->writes && action == WRITE)
        return set(s, offset, (uint32_t)value);
    return image->writes ? set64(s, offset, image->base + value) : SPEQ_OK;
}

static int load_region(struct speq *s, const struct image *image, const unsigned char *entry)
{
    uint64_t offset = number64(entry + 8), size = number64(entry + 16);
    uint64_t position = number64(entry + 24), address = image->base + offset;
    if (offset > image->memory_bytes || size > image->memory_bytes - offset ||
        offset % WORD_BYTES || (position && size % WORD_BYTES))
        return SPEQ_DAMAGED;
    if (number32(entry) == KIND_TEXT && size / TOKEN_BYTES >= s->capacity)
        s->text = address;
    return !position ? SPEQ_OK : load_piece(s, image, position, size, number32(entry + 4),
                                            image->writes, address);
}

/* Add the load address to a word in memory. */
static int load_relocation(struct speq *s, const struct image *image, const unsigned char *entry)
{
    unsigned char word[WORD_BYTES];
    uint64_t offset = number64(entry), address = image->base + offset;
    if (offset > image->memory_bytes - WORD_BYTES || offset % WORD_BYTES)
        return SPEQ_DAMAGED;
    if (!image->writes)
        return SPEQ_OK;
    BOARD(read_memory, address, word, sizeof word);
    put(word, number64(word) + image->base, sizeof word);
    BOARD(write_memory, address, word, sizeof word);
    return SPEQ_OK;
}

static int load_tables(struct speq *s, const struct image *image)
{
    unsigned char entry[REGION_BYTES];
    uint64_t regions = HEADER_BYTES, registers = regions + (uint64_t)REGION_BYTES * image->regions;
    uint64_t relocations = registers + (uint64_t)REGISTER_BYTES * image->registers;
    for (uint32_t i = 0; i < image->registers; i++) {
        TRY(read_file(image, registers + (uint64_t)REGISTER_BYTES * i, entry, REGISTER_BYTES));
        TRY(load_register(s, image, entry));
    }
    for (uint32_t i = 0; i < image->regions; i++) {
        TRY(read_file(image, regions + (uint64_t)REGION_BYTES * i, entry, REGION_BYTES));
        TRY(load_region(s, image, entry));
    }
    for (uint32_t i = 0; i < image->relocations; i++) {
        TRY(read_file(image, relocations + (uint64_t)WORD_BYTES * i, entry, WORD_BYTES));
        TRY(load_relocation(s, image, entry));
    }
    return SPEQ_OK;
}

int speq_load(struct speq *s, const struct speq_board *board, const struct speq_file *file,
              uint64_t base, uint64_t size)
{
    struct image image = {file, base, 0, 0, 0, 0, 0, 0};
    uint64_t last;
    uint32_t bits, array, log2;
    memset(s, 0, sizeof *s);
    s->board = *board;
    TRY(load_header(s, &image));
    TRY(load_tables(s, &image));
    TRY(get(s, SPEQ_REG_ADDRESS_BITS, &bits));
    last = base + (image.memory_bytes - 1);
    if (base % image.alignment || last < base || (bits < 64 && last >> bits))
        return SPEQ_BAD_ADDRESS;
    if (image.memory_bytes > size)
        return SPEQ_NO_ROOM;
    if (!s->text)
        return SPEQ_DAMAGED;
    TRY(stop(s));
    image.writes = 1;
    TRY(load_tables(s, &image));
    TRY(get64(s, SPEQ_REG_RING, &s->ring));
    TRY(get(s, SPEQ_REG_RING_LOG2, &log2));
    TRY(get(s, SPEQ_REG_DRAFT_LENGTH, &s->draft_length));
    TRY(get(s, SPEQ_REG_HISTORY_SIZE, &s->history));
    TRY(get(s, SPEQ_REG_ARRAY, &array));
    s->ring_tokens = 1u << log2;
    s->rows = FIELD(ARRAY_ROWS, array);
    return SPEQ_OK;
}

/* Decoding. */

/* Give a run its text, of which the KV cache has the first `start` tokens, and how to decode. */
static int write_run(struct speq *s, const struct speq_run *run, uint32_t start)
{
    uint32_t length = run->length, flags = SPEQ_RUN_SPECULATE_MASK | SPEQ_RUN_MOVE_MASK;
    for (uint32_t i = start; i < length; i++) {
        unsigned char word[TOKEN_BYTES];
        put(word, run->prompt[i], sizeof word);
        BOARD(write_memory, s->text + (uint64_t)TOKEN_BYTES * i, word, sizeof word);
    }
#ifdef SPEQ_REG_HISTORY
    TRY(set(s, SPEQ_REG_HISTORY_LENGTH, 0));
    for (uint32_t i = length > s->history ? length - s->history : 0; i < length; i++)
        TRY(set(s, SPEQ_REG_HISTORY, run->prompt[i]));
#endif
    TRY(set(s, SPEQ_REG_POSITION, start));
    TRY(set(s, SPEQ_REG_PROMPT_END, length - 1));
    TRY(set(s, SPEQ_REG_ROOT, run->prompt[length - 1]));
    if (run->sample) {
        union { float value; uint32_t bits; } scale, cutoff = {run->cutoff};
        scale.value = (float)(1.0 / run->temperature);
        flags |= SPEQ_RUN_SAMPLE_MASK | (run->truncate ? SPEQ_RUN_TRUNCATE_MASK : 0);
        TRY(set(s, SPEQ_REG_SCALE, scale.bits));
        TRY(set(s, SPEQ_REG_CUTOFF, cutoff.bits));
        TRY(set64(s, SPEQ_REG_SEED, run->seed));
    }
    TRY(set(s, SPEQ_REG_RUN, flags));
    for (uint32_t i = 0; i < run->stop_count; i++)
        TRY(set(s, SPEQ_REG_STOP_TOKEN + i * SPEQ_REG_STOP_TOKEN_STRIDE, run->stops[i]));
    return set(s, SPEQ_REG_STOP_TOKENS, run->stop_count);
}

/* The tokens of a run: how many the caller has, the last of them, and how he takes them. */
struct tokens {
    uint32_t given, last;
    speq_token token;
    void *context;
};

/* Give the caller what is new in the ring. */
static int give(struct speq *s, struct tokens *tokens)
{
    uint32_t index;
    TRY(get(s, SPEQ_REG_RING_INDEX, &index));
    while (tokens->given < index) {
        unsigned char word[TOKEN_BYTES];
        uint64_t place = (uint64_t)TOKEN_BYTES * (tokens->given++ % s->ring_tokens);
        BOARD(read_memory, s->ring + place, word, sizeof word);
        tokens->last = number32(word);
        if (tokens->token(tokens->context, tokens->last))
            return SPEQ_CANCELLED;
    }
    return SPEQ_OK;
}

/* A run of at most `limit` tokens, with drafts of at most `draft`. */
static int run_once(struct speq *s, uint32_t draft, uint32_t limit, struct tokens *tokens)
{
    uint32_t state = SPEQ_STATE_RUNNING;
    tokens->given = 0;
    TRY(set(s, SPEQ_REG_DRAFT_LENGTH, draft));
    TRY(set(s, SPEQ_REG_TOKEN_LIMIT, limit));
    TRY(set(s, SPEQ_REG_IRQ_STATUS, UINT32_MAX));
    TRY(set(s, SPEQ_REG_CONTROL, SPEQ_CONTROL_START_MASK));
    while (state == SPEQ_STATE_RUNNING || state == SPEQ_STATE_STOPPING) {
        TRY(s->board.wait && s->board.wait(s->board.context) ? SPEQ_BOARD_FAILED : SPEQ_OK);
        TRY(get(s, SPEQ_REG_STATUS, &state));
        TRY(give(s, tokens));
    }
    if (state != SPEQ_STATE_ERROR)
        return state == SPEQ_STATE_IDLE ? SPEQ_OK : SPEQ_UNEXPECTED;
    TRY(get(s, SPEQ_REG_ERROR, &s->error));
    TRY(get64(s, SPEQ_REG_ERROR_ADDRESS, &s->error_address));
    return SPEQ_RUN_FAILED;
}

static int decode(struct speq *s, const struct speq_run *run, uint32_t left, struct tokens *tokens)
{
    uint32_t pass, kind, repeats = 0; /* a step, without drafts */
    while (left) {
        /* No more tokens than the ring holds, so that the caller may be slow. */
        uint32_t limit = repeats ? 1 : left < s->ring_tokens ? left : s->ring_tokens;
        int result = run_once(s, run->plain || repeats ? 0 : s->draft_length, limit, tokens);
        repeats = 0;
        if (result == SPEQ_RUN_FAILED && s->error == SPEQ_ERROR_NONFINITE) {
            /* In a pass that plain decoding would not make? */
            TRY(get(s, SPEQ_REG_PASS, &pass));
            kind = FIELD(PASS_KIND, pass);
            repeats = kind == SPEQ_PASS_DRAFT ||
                      (kind == SPEQ_PASS_VERIFY && FIELD(PASS_ROWS, pass) > 1);
        }
        TRY(repeats ? stop(s) : result);
        if (!repeats && !tokens->given)
            return SPEQ_UNEXPECTED;
        left -= tokens->given;
        for (uint32_t i = 0; tokens->given && i < run->stop_count; i++)
            if (tokens->last == run->stops[i])
                return SPEQ_OK;
    }
    return SPEQ_OK;
}

int speq_generate(struct speq *s, const struct speq_run *run, speq_token token, void *context)
{
    struct tokens tokens = {0, 0, token, context};
    uint32_t length = run->length, start = run->resume, limit = run->max_tokens;
    int64_t most = (int64_t)s->capacity + 2 - s->rows; /* tokens of the text, and one */
    int result, stopped;
    if (!s->rows)
        return SPEQ_NOT_LOADED;
    if (!limit || run->stop_count > SPEQ_REG_STOP_TOKEN_COUNT ||
        (run->sample && !(run->temperature > 0)))
        return SPEQ_BAD_SETTING;
    most = most < s->context ? most : s->context;
    if (!length || length >= most)
        return SPEQ_BAD_PROMPT;
    for (uint32_t i = 0; i < length; i++)
        if (run->prompt[i] >= s->vocabulary)
            return SPEQ_BAD_PROMPT;
    limit = limit < most - length ? limit : (uint32_t)(most - length);
    start = start < s->known ? start : s->known;
    start = start < length ? start : length - 1;
    s->known = 0;
    result = stop(s);
    result = result != SPEQ_OK ? result : write_run(s, run, start);
    result = result != SPEQ_OK ? result : decode(s, run, limit, &tokens);
    stopped = stop(s);
    if (result != SPEQ_OK && result != SPEQ_CANCELLED)
        return result; /* the first error says more */
    TRY(stopped);
    TRY(get(s, SPEQ_REG_POSITION, &s->known));
    return result;
}
