// Where a part of a process that callgrind watches begins and ends. Until start() nothing is counted, nor slowed down.
#include <valgrind/callgrind.h>

void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void stop(void) { CALLGRIND_STOP_INSTRUMENTATION; }

void begin(void) { CALLGRIND_ZERO_STATS; }
// Everything since begin() goes to a file of its own, which names the part.
void end(const char* part) { CALLGRIND_DUMP_STATS_AT(part); }
