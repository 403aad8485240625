#include "stages.h"
void run(const Heads&, Crew&) {}
void run(const Attention&, Crew&) {}

TF_STAGE(Heads)
TF_STAGE(Attention)
