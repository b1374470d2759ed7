/* The first page of a file, mapped shared: its words of four digits are loaded and stored without a request. */
#ifndef MAPPING_H
#define MAPPING_H

#include <stdint.h>

/* A word is what read(2) sees as four digits; loads and stores are sequentially consistent. */
typedef _Atomic uint32_t word;

enum { MAPPING_BYTES = 4096 };

/* Before the first mapping: a load or store beyond the end of a file (SIGBUS) is an error from then on. */
void mapping_prepare(void);

/* 0, or a negative errno. */
int32_t mapping_make(const char *file, word **words);
void mapping_remove(word *words);

/* The number in a word; -EILSEQ: no digits, as zeros are none; -EFAULT: beyond the end of the file. */
int32_t mapping_load(word *words, int position);
int32_t mapping_store(word *words, int position, int number);

#endif
