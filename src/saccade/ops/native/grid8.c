/* grid.c and its backward pass with vectors of 8. */

#define LANES 8
#define GRID saccade_grid8
#define GRID_GRADIENTS saccade_grid8_gradients
#define GRID_TASKS saccade_grid8_tasks
#include "grid.c"
#include "grid_gradients.c"
