/* Work of somebody else's on the threads that torch's operations and all loops here run on. */

/* Call `work` once on each of `threads` threads. */
void saccade_team(void (*work)(void), int threads) {
#pragma omp parallel num_threads(threads)
    work();
}
