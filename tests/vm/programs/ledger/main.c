/*
 * ledger DIRECTORY ME COUNT: make COUNT transactions in DIRECTORY/ledger.db, in turns with another machine.
 *
 * Whose turn it is says a word of DIRECTORY/turn, which both have mapped: even numbers are of 0, odd ones of 1. Turn 2,
 * when both have opened the database, is of the host, which makes it 4. SQLite's locks are of no use here, as each
 * machine has its own. The database is in WAL mode: what the other one has committed
 * is known only by the -shm file, which SQLite maps. Each transaction expects exactly what the one before it has left.
 */
#include <err.h>
#include <fcntl.h>
#include <sqlite3.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { HOST = 2, FIRST = 4, RECENT = 9 };

static volatile uint32_t *turn;
static sqlite3 *database;
static char path[256];
static uint32_t me;

static void do_sql(const char *words)
{
    char *problem = NULL;

    if (sqlite3_exec(database, words, NULL, NULL, &problem) != SQLITE_OK)
        errx(1, "turn %u: %s: %s (%d)", *turn, words, problem, sqlite3_extended_errcode(database));
}

/* Linux goes by the size that it knows, where files are mapped, and does not ask when a program reads or loads. */
static void ask_size(const char *end)
{
    char name[300];
    struct stat status;

    snprintf(name, sizeof(name), "%s%s", path, end);
    (void)stat(name, &status);
}

static void take_turn(void)
{
    struct timespec moment = { 0, 20000 };

    while (*turn % 2 != me || *turn == HOST)
        nanosleep(&moment, NULL);
    __sync_synchronize();
    ask_size("-shm");
    ask_size("-wal");
    ask_size("");
}

static void give_turn(void)
{
    __sync_synchronize();
    *turn = *turn + 1;
}

static sqlite3_stmt *prepare(const char *words)
{
    sqlite3_stmt *statement;

    if (sqlite3_prepare_v2(database, words, -1, &statement, NULL) != SQLITE_OK)
        errx(1, "%s: %s", words, sqlite3_errmsg(database));
    return statement;
}

static void step(sqlite3_stmt *statement, int wanted)
{
    int got = sqlite3_step(statement);

    if (got != wanted)
        errx(1, "turn %u: %s: %s (%d)", *turn, sqlite3_sql(statement), sqlite3_errmsg(database),
             sqlite3_extended_errcode(database));
}

int main(int count, char **words)
{
    char name[300];
    sqlite3_stmt *last, *add;
    int fd, done;

    if (count != 4)
        errx(2, "usage: ledger DIRECTORY ME COUNT");
    me = (uint32_t)atoi(words[2]);
    snprintf(name, sizeof(name), "%s/turn", words[1]);
    snprintf(path, sizeof(path), "%s/ledger.db", words[1]);
    if ((fd = open(name, O_RDWR)) < 0)
        err(1, "%s", name);
    turn = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (turn == MAP_FAILED)
        err(1, "mmap");
    take_turn();
    if (sqlite3_open(path, &database) != SQLITE_OK)
        errx(1, "%s: %s", path, sqlite3_errmsg(database));
    do_sql("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
           "CREATE TABLE IF NOT EXISTS ledger (turn INTEGER PRIMARY KEY, who INTEGER, text TEXT);"
           "CREATE INDEX IF NOT EXISTS texts ON ledger (text);");
    last = prepare("SELECT max(turn), count(*) FROM ledger WHERE turn > ?");
    add = prepare("INSERT INTO ledger VALUES (?, ?, hex(randomblob(40)))");
    give_turn();
    for (done = 0; done < atoi(words[3]); done++) {
        uint32_t now;
        long latest, recent, wanted;

        take_turn();
        now = *turn;
        do_sql("BEGIN IMMEDIATE");
        sqlite3_bind_int64(last, 1, (long)now - RECENT - 1);
        step(last, SQLITE_ROW);
        latest = sqlite3_column_int64(last, 0);
        recent = sqlite3_column_int64(last, 1);
        wanted = now - FIRST < RECENT ? now - FIRST : RECENT;
        if (recent != wanted || (recent && latest != (long)now - 1))
            errx(1, "turn %u: %ld is the latest, %ld recent ones", now, latest, recent);
        sqlite3_reset(last);
        sqlite3_bind_int64(add, 1, now);
        sqlite3_bind_int64(add, 2, me);
        step(add, SQLITE_DONE);
        sqlite3_reset(add);
        do_sql("COMMIT");
        give_turn();
    }
    take_turn();
    sqlite3_finalize(last);
    sqlite3_finalize(add);
    if (sqlite3_close(database) != SQLITE_OK)
        errx(1, "close: %s", sqlite3_errmsg(database));
    give_turn();
    return 0;
}
