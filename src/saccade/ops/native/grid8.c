/* grid.c with vectors of 8. */

#define LANES 8
#define GRID saccade_grid8
#include "grid.c"
