#include "CSHA256.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <string.h>

#define SHA_TARGET __attribute__((target("sha,sse4.1,ssse3")))
#define ALWAYS static inline __attribute__((always_inline)) SHA_TARGET

static const uint32_t constants[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

bool sha256_pair_is_supported(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSE4_1) || !(c & bit_SSSE3)) return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_SHA);
}

// Working variables as the instructions want them: A B E F and C D G H, from the highest word down.
typedef struct {
    __m128i abef, cdgh;
} State;

ALWAYS void load(__m128i w[4], const uint8_t *block) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    for (int i = 0; i < 4; i++) w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)block + i), swap);
}

// Four rounds with the words in w[i % 4], which are then replaced by those sixteen rounds further on.
ALWAYS void four_rounds(State *s, __m128i w[4], int i) {
    __m128i now = w[i % 4], k = _mm_add_epi32(now, _mm_load_si128((const __m128i *)constants + i));
    s->cdgh = _mm_sha256rnds2_epu32(s->cdgh, s->abef, k);
    s->abef = _mm_sha256rnds2_epu32(s->abef, s->cdgh, _mm_shuffle_epi32(k, 0x0e));
    if (i < 12) {
        __m128i last = w[(i + 3) % 4], sum = _mm_sha256msg1_epu32(now, w[(i + 1) % 4]);
        sum = _mm_add_epi32(sum, _mm_alignr_epi8(last, w[(i + 2) % 4], 4));
        w[i % 4] = _mm_sha256msg2_epu32(sum, last);
    }
}

ALWAYS void add_blocks(State *s, State *t, const uint8_t *first, const uint8_t *second) {
    const State s0 = *s, t0 = *t;
    __m128i v[4], w[4];
    load(v, first);
    load(w, second);
#pragma clang loop unroll(full)
    for (int i = 0; i < 16; i++) {
        four_rounds(s, v, i);
        four_rounds(t, w, i);
    }
    s->abef = _mm_add_epi32(s->abef, s0.abef);
    s->cdgh = _mm_add_epi32(s->cdgh, s0.cdgh);
    t->abef = _mm_add_epi32(t->abef, t0.abef);
    t->cdgh = _mm_add_epi32(t->cdgh, t0.cdgh);
}

ALWAYS void store(State s, uint8_t *digest) {
    const uint32_t words[8] = {
        _mm_extract_epi32(s.abef, 3), _mm_extract_epi32(s.abef, 2), _mm_extract_epi32(s.cdgh, 3),
        _mm_extract_epi32(s.cdgh, 2), _mm_extract_epi32(s.abef, 1), _mm_extract_epi32(s.abef, 0),
        _mm_extract_epi32(s.cdgh, 1), _mm_extract_epi32(s.cdgh, 0),
    };
    for (int i = 0; i < 8; i++) {
        uint32_t word = __builtin_bswap32(words[i]);
        memcpy(digest + 4 * i, &word, 4);
    }
}

SHA_TARGET void sha256_pair(const uint8_t *first, const uint8_t *second, size_t count, uint8_t *first_digest,
                            uint8_t *second_digest) {
    State s = {_mm_set_epi32(0x6a09e667, 0xbb67ae85, 0x510e527f, 0x9b05688c),
               _mm_set_epi32(0x3c6ef372, 0xa54ff53a, 0x1f83d9ab, 0x5be0cd19)};
    State t = s;
    for (size_t at = 0; at < count; at += 64) add_blocks(&s, &t, first + at, second + at);
    uint8_t padding[64] = {0x80};
    uint64_t bits = __builtin_bswap64((uint64_t)count * 8);
    memcpy(padding + 56, &bits, 8);
    add_blocks(&s, &t, padding, padding);
    store(s, first_digest);
    store(t, second_digest);
}

#else

bool sha256_pair_is_supported(void) { return false; }

void sha256_pair(const uint8_t *first, const uint8_t *second, size_t count, uint8_t *first_digest,
                 uint8_t *second_digest) {
    __builtin_trap();
}

#endif
