/* Work of somebody else's on the threads that torch's operations and all loops here run on. */

/* Call `work`, a function without arguments, once on each of `threads` threads. */
void saccade_team(const void *work, int threads) {
#pragma omp parallel num_threads(threads)
    ((void (*)(void))work)();
}
