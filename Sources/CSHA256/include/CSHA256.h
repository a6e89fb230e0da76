#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Whether this CPU has the instructions that `sha256_pair` needs.
bool sha256_pair_is_supported(void);

// SHA-256 (FIPS 180-4) of two messages of one length, a multiple of 64 bytes. A round of the CPU's SHA instructions
// waits for the one before; two messages in turn fill that wait, which takes little longer than one alone.
void sha256_pair(const uint8_t *first, const uint8_t *second, size_t count, uint8_t *first_digest,
                 uint8_t *second_digest);
