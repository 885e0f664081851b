/* What the counted process tells callgrind: which instructions to count, and under which name to write them down.
 * Outside valgrind these requests do nothing.
 */

#include <valgrind/callgrind.h>

int callgrind_present(void) { return RUNNING_ON_VALGRIND > 0; }

void callgrind_begin(void) {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}

void callgrind_end(const char* label) {
  CALLGRIND_DUMP_STATS_AT(label);
  CALLGRIND_STOP_INSTRUMENTATION;
}
