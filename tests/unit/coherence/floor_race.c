/*
 * A backend lifts the floor at the worst moment: after coherenced, which ends a distrust, took its number from the
 * sequence, and before it stores the number. Exit status 1: what a guest fetched just before the change is good.
 */
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

static uint64_t take(_Atomic uint64_t *sequence);
#undef atomic_fetch_add
#define atomic_fetch_add(word, one) take(word)
#include "table.h"

static _Atomic uint64_t words[VT_WORD_SLOTS + 1024];
static vt_t table;
static uint64_t stamp;
static int lifted;

static uint64_t take(_Atomic uint64_t *sequence)
{
    uint64_t taken = atomic_fetch_add_explicit(sequence, 1, memory_order_seq_cst);

    if (!lifted) {
        lifted = 1;
        stamp = vt_stamp(&table); /* a guest fetches; then another's change takes effect, and is acknowledged: */
        vt_lift_floor(&table);
    }
    return taken;
}

int main(void)
{
    words[VT_WORD_SLOT_COUNT] = 1024;
    words[VT_WORD_SEQUENCE] = words[VT_WORD_FLOOR] = 1;
    vt_attach(&table, words);
    vt_distrust(&table);
    vt_raise_floor(&table);
    return vt_valid(&table, 5, stamp) || !vt_valid(&table, 5, vt_stamp(&table));
}
