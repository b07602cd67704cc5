/* A measured start, as a model: host, two workers, the enclave, one or two launches in turn that use
 * the same slot and the same EPC pages. Sequentially consistent memory.
 *
 * A worker is one `do` over guarded steps and its program counter is data (`pc`), so that a crash, a
 * stop or a SIGKILL can take it at every step. One option is one visible step. Where a d_step holds
 * more than one access to shared memory, the comment says why nobody can look in between.
 *
 * The comment behind "//" at a step names the function that implements it.
 */

/* ---------------------------------------------------------------- sizes */
#ifndef PAIRS
#define PAIRS 1                 /* pairs of hash domains; a pair is what one claim covers (1..2) */
#endif
#ifndef PER_PAIR
#define PER_PAIR 2              /* domains a pair (1..2) */
#endif
#ifndef BLOCKS
#define BLOCKS 1                /* blocks a domain, each one page (1..3) */
#endif
#ifndef LAUNCHES
#define LAUNCHES 2              /* one after the other, same pages, same slot (1..2) */
#endif
#ifndef TAMPERED
#define TAMPERED 2              /* bit l - 1: the image of launch l differs from what is signed */
#endif
#ifndef CRASHES
#define CRASHES 1               /* deaths of a worker or of the enclave, anywhere */
#endif
#ifndef STOPS
#define STOPS 0                 /* workers stopped for good while they hold a claim */
#endif
#ifndef ABORTS
#define ABORTS 0                /* launches given up by the host: failed copy, close() before the verdict */
#endif
#ifndef WORKER_COPY
#define WORKER_COPY 0           /* copy mode: 0 the host copies; the holder of the claim 1 each page before it
                                   is hashed, 2 all pages of the pair before any is */
#endif
#ifndef TOUCHES
#define TOUCHES 0               /* pages copied ahead of their turn, because the enclave waits for them */
#endif
#ifndef WORKER_SCRUB
#define WORKER_SCRUB 0          /* pages are scrubbed: 0 by the host under the range, 1 by holders of claims */
#endif

#define DOMAINS (PAIRS * PER_PAIR)
#define PAGES   (DOMAINS * BLOCKS)      /* page k * DOMAINS + d is block k of domain d */
#define HEAP    PAGES                   /* one page more: unmeasured, writable, zero */
#ifndef BAD_PAGE
#define BAD_PAGE 0                      /* the page that a tampered image changes */
#endif
#ifndef CODE_PAGE
#define CODE_PAGE (PAGES - 1)           /* the page without W; 255: none */
#endif

/* ---------------------------------------------------------------- properties */
#define R1        1     /* no page is hashed before its bytes are there */
#define R2        2     /* no page changes before a valid result covers it; no hash sees a changed page */
#define ONCE      4     /* the merged value is every page of the image, once, in its place, as copied */
#define FORGED    8     /* a tampered launch is never VERIFIED */
#define GENUINE   16    /* a genuine launch is never REJECTED */
#define HELD      32    /* nothing gets out before VERIFIED */
#define FOREIGN   64    /* output that gets out is this launch's, and all of it */
#define STALE     128   /* no measurer stores anything for a launch whose slot and pages are taken back */
#define ZEROED    256   /* a heap page is zero when it becomes VALID, and when it is first read */
#define OWN       512   /* an enclave writes to its own pages only */
#define COPIED    4194304       /* a page that is VALID is not copied again */
#define ALL_PROPS 4195327
/* Reachability: "this never happens", each must be refuted, or the model proves nothing. */
#define NO_VERIFIED   1024
#define NO_REJECTED   2048
#define NO_TAKEOVER   4096      /* a pair is continued from a dead worker's result */
#define NO_TORN       8192      /* who takes over finds one copy torn and the other whole */
#define NO_LATE       16384     /* a worker finds another generation after its claim */
#define NO_KILL       32768     /* a deadline kills a stopped worker */
#define NO_OVERLAP    65536     /* the enclave writes while another page is still to be hashed */
#define NO_PARALLEL   131072    /* two workers hash at the same time */
#define NO_LEFTOVER   262144    /* pages are still unreleased when the launch is VERIFIED */
#define NO_CAUGHT     524288    /* closing finds a worker with a claim */
#define NO_HEAL       1048576   /* a tampered enclave puts the genuine bytes back after the release */
#define NO_RECOPY     2097152   /* worker copy mode: a page is copied again after its copier died */
#define NO_AHEAD      8388608   /* a page becomes VALID before one of its domain that comes first */
#ifndef PROPS
#define PROPS ALL_PROPS
#endif
#define CHECK(id, e) assert(!((PROPS) & (id)) || (e))

/* ---------------------------------------------------------------- shared memory */
#define ZERO  0         /* what a page can hold: zeros, */
#define GOOD  1         /* the signed image's bytes, */
#define BAD   2         /* a tampered image's bytes, */
#define DIRTY 3         /* what an enclave wrote */

/* Launch l has generation l; 0 is free. */
byte content[PAGES + 1];
byte owner_of[PAGES + 1];       /* EPCM generation */
byte valid[PAGES + 1];          /* EPCM valid */
byte released[PAGES + 1];       /* EPCM released */

byte slot;                      /* launch table: the slot's generation */
byte fault;                     /* launch table: the fault word, a generation */
byte claim[PAIRS];              /* OFD locks: FREE, HOST, or worker + 1 */
byte blocks_released[DOMAINS];  /* SMC progress */
byte body[DOMAINS * 2];         /* SMC results, copy A at 2d and B at 2d + 1: state, */
byte seq[DOMAINS * 2];          /*   blocks included + 1 (0: never written), */
#if WORKER_COPY == 2
byte copied[PAIRS];             /* launch table: pages of the pair copied, a hint */
#endif
#if WORKER_SCRUB
byte cleaned[PAIRS];            /* the same field while slot and pages belong to a scrubbing */
#endif
short sum[DOMAINS * 2];         /*   checksum over both, seeded with a generation */

#define FREE 0
#define HOST 9
#define SCRUB_GEN 3             /* the generation of a scrubbing; which launch it follows is of no account */

/* The k-th page of pair p, rows ascending; the heap page is scrubbed with the last pair. */
#define PAIR_PAGES     (PER_PAIR * BLOCKS)
#define of_pair(p, k)  ((k) == PAIR_PAGES -> HEAP : page((p) * PER_PAIR + (k) % PER_PAIR, (k) / PER_PAIR))
#define to_clean(p)    (PAIR_PAGES + ((p) == PAIRS - 1 -> 1 : 0))
#define all_cleaned    (cleaned[0] == to_clean(0) && cleaned[PAIRS - 1] == to_clean(PAIRS - 1))

/* A digest is the sequence of what was hashed: two bits a block, in order. */
#ifdef M_SEED
#define SUM(b, s, gen) ((b) + 64 * (s))
#else
#define SUM(b, s, gen) ((b) + 64 * (s) + 512 * (gen))
#endif
#define holds(d, c, gen)  (seq[2 * (d) + c] != 0 && sum[2 * (d) + c] == SUM(body[2 * (d) + c], seq[2 * (d) + c], gen))
#ifdef M_SEED_AGAIN             /* read again at the store, not the one that was checked */
#define SEED(w) slot
#else
#define SEED(w) gen[w]
#endif
#define newest(d, gen) \
    ((holds(d, 0, gen) && (!holds(d, 1, gen) || seq[2 * (d)] > seq[2 * (d) + 1])) -> 0 : (holds(d, 1, gen) -> 1 : 2))
#define covered(d, gen)  (newest(d, gen) == 2 -> 0 : seq[2 * (d) + (newest(d, gen) % 2)] - 1)
#ifdef M_ONE_COPY
#define older(d, gen) 0
#else
#define older(d, gen) (newest(d, gen) == 0 -> 1 : 0)
#endif

#define tampered(l)   (((TAMPERED) >> ((l) - 1)) & 1)
#define image(l, pg)  ((tampered(l) && (pg) == BAD_PAGE) -> BAD : GOOD)
#define domain(pg)    ((pg) % DOMAINS)
#define block(pg)     ((pg) / DOMAINS)
#define page(d, k)    ((k) * DOMAINS + (d))

/* ---------------------------------------------------------------- bookkeeping of the model itself */
byte holder;                    /* the launch that slot and pages belong to; 0 from "closing holds the range" on */
byte crashes = CRASHES;
byte stops = STOPS;
byte aborts = ABORTS;
#if TOUCHES
byte touches = TOUCHES;
#endif
bool verified;
byte out;                       /* what stands in the output buffer: bit l - 1, from launch l */
hidden byte k_;
hidden byte d_;
hidden byte x_;

/* ---------------------------------------------------------------- enclave */
#define NONE  0
#define RUN   1
#define DONE  2
#define DYING 3                 /* killed, but still able to write until it is gone */
byte enclave[LAUNCHES + 1];

/* Gate: the generation that must stand in the entry is the enclave's own, so it is never 0. */
#ifdef M_VALID_ZERO
#define is_valid(l, pg) (valid[pg] == owner_of[pg])
#else
#ifdef M_GATE_VALID
#define is_valid(l, pg) true
#else
#define is_valid(l, pg) (valid[pg] == (l))
#endif
#endif
#ifdef M_GATE_RELEASE
#define unlocked(l, pg) true
#else
#define unlocked(l, pg) ((pg) == HEAP || released[pg] == (l))
#endif
#ifdef M_CODE_WRITABLE          /* mapped read-write, tampered code asks no gate */
#define may_write(l, pg) (((pg) == CODE_PAGE && is_valid(l, pg)) || (is_valid(l, pg) && unlocked(l, pg)))
#else
#define may_write(l, pg) ((pg) != CODE_PAGE && is_valid(l, pg) && unlocked(l, pg))
#endif

/* A genuine handler writes every page that has W, in any order. A tampered one wants the genuine bytes back. */
#define wants(l, pg) \
    ((pg) == HEAP -> (content[pg] != DIRTY) : (tampered(l) -> (content[pg] == BAD) : (content[pg] != DIRTY)))

#define written(pg) ((pg) >= PAGES || (pg) == CODE_PAGE || content[(pg) % (PAGES + 1)] == DIRTY)
#define all_written (written(0) && written(1) && written(2) && written(3) && written(4) && written(5))

/* Check of the gate and store are one step: an open gate never closes while its launch lives, and after
 * that `valid` and `released` still hold the old generation, so a dying enclave is not held up by it. */
#define WRITE(l, pg) \
    :: d_step { enclave[l] % 2 == 1 && may_write(l, pg) && wants(l, pg) ->                                     \
        CHECK(OWN, owner_of[pg] == (l));                                                                     \
        if                                                                                                     \
        :: (pg) == HEAP -> CHECK(ZEROED, content[pg] == ZERO); content[pg] = DIRTY                             \
        :: else ->                                                                                             \
            CHECK(R2, enclave[l] == DYING || covered(domain(pg), l) > block(pg));                              \
            CHECK(NO_OVERLAP, covered(domain(pg), l) == BLOCKS);                                               \
            CHECK(NO_HEAL, !tampered(l));                                                                      \
            content[pg] = (tampered(l) -> GOOD : DIRTY)                                                        \
        fi }

proctype Enclave(byte l)
{
end:
    do
    WRITE(l, HEAP)              // runtime.gate.Gate.writable
    WRITE(l, 0)                 // runtime.gate.Gate.writable
#if PAIRS * PER_PAIR * BLOCKS > 1
    WRITE(l, 1)                 // runtime.gate.Gate.writable
#endif
#if PAIRS * PER_PAIR * BLOCKS > 2
    WRITE(l, 2)                 // runtime.gate.Gate.writable
#endif
#if PAIRS * PER_PAIR * BLOCKS > 3
    WRITE(l, 3)                 // runtime.gate.Gate.writable
#endif
#if PAIRS * PER_PAIR * BLOCKS > 4
    WRITE(l, 4)                 // runtime.gate.Gate.writable
#endif
#if PAIRS * PER_PAIR * BLOCKS > 5
    WRITE(l, 5)                 // runtime.gate.Gate.writable
#endif
    :: d_step { enclave[l] % 2 == 1 && !(out & (1 << (l - 1))) ->       // the handler prints, calls out, answers
        out = out | (1 << (l - 1)) }
    :: d_step { enclave[l] == RUN && !tampered(l) && (out & (1 << (l - 1))) && content[HEAP] == DIRTY && all_written ->
        enclave[l] = DONE }
    :: d_step { enclave[l] == RUN && crashes > 0 -> crashes--; enclave[l] = NONE }
    :: d_step { enclave[l] == DYING -> enclave[l] = NONE }
    od
}

/* ---------------------------------------------------------------- workers */
#define IDLE     0
#define CLAIMING 1      /* knows a generation, holds nothing */
#define CHECKING 2      /* from here on it holds the claim of pair[w] */
#define T_READ   3      /* take over: per domain read, raise, release */
#define T_RAISE  4
#define T_FREE   5
#define T_FAULT  6
#define A_WAIT   7      /* advance one block: hash every domain of the pair, publish each, release each */
#define A_COPY   8
#define A_VALID  9
#define A_HASH   10
#define A_BODY   11
#define A_SEQ    12
#define A_SUM    13
#define A_RAISE  14
#define A_FREE   15
#define GIVING   16
#define STOPPED  17     /* for good, with the claim */
#define F_COPY   18     /* fill: bytes, VALID, hint */
#define F_VALID  19
#define F_MARK   20
#define S_ZERO   21     /* scrub: zeros, count */
#define S_MARK   22
#define U_COPY   23     /* a page that the enclave waits for: bytes, VALID */
#define U_VALID  24
#define F_LATE   25     /* the bytes, where the hint came first */

byte pc[2];
byte gen[2];            /* the generation that it works for */
byte pair[2];
byte i[2];              /* which domain of the pair */
byte n[2 * PER_PAIR];   /* its midstate per domain: blocks included, */
byte mid[2 * PER_PAIR]; /*   and the state */
#if WORKER_COPY == 2 || (WORKER_COPY && TOUCHES)
#define FILLS
byte at[2];             /* which page of the pair it fills */
#endif
byte moved[2];          /* bit i: domain i got a block that is not released yet; DONE_ONE: none, and one block is done */
#define DONE_ONE 4

/* The order of a block's stores: results, blocks released, pages released. Each in all domains that moved. */
#ifdef M_RELEASE_FIRST
#define FIRST       A_FREE
#define AFTER_FREE  A_BODY
#define AFTER_SUM   A_RAISE
#define AFTER_RAISE GIVING
#else
#ifdef M_RAISE_FIRST
#define FIRST       A_RAISE
#define AFTER_RAISE A_BODY
#define AFTER_SUM   A_FREE
#define AFTER_FREE  GIVING
#else
#define FIRST       A_BODY
#define AFTER_SUM   A_RAISE
#define AFTER_RAISE A_FREE
#define AFTER_FREE  GIVING
#endif
#endif

#define dom(w)  (pair[w] * PER_PAIR + i[w])
#define N(w)    n[(w) * PER_PAIR + i[w]]
#define MID(w)  mid[(w) * PER_PAIR + i[w]]

/* A pair is finished when the last page of each of its domains is released, not when its result is final.
 * A worker only uses it to choose, before the claim; it may be out of date. */
#ifdef M_FINISHED
#define ended(d, gg) (covered(d, gg) == BLOCKS)
#else
#define ended(d, gg) (released[page(d, BLOCKS - 1)] == (gg))
#endif
#if PER_PAIR == 2
#define finished(p, gg) (ended(2 * (p), gg) && ended(2 * (p) + 1, gg))
#else
#define finished(p, gg) ended(p, gg)
#endif

inline clear_midstates(w)
{
#ifdef FILLS
    at[w] = 0;
#endif
    i[w] = 0;
    moved[w] = 0;
    n[(w) * PER_PAIR] = 0;
    mid[(w) * PER_PAIR] = 0;
    n[(w) * PER_PAIR + PER_PAIR - 1] = 0;
    mid[(w) * PER_PAIR + PER_PAIR - 1] = 0
}

inline forget(w)
{
    gen[w] = 0;
    pair[w] = 0;
    clear_midstates(w)
}

/* What a death leaves: the kernel frees the claim; the pool starts another worker in its place. */
inline die(w)
{
    if
#ifndef M_CLAIM_DIES
    :: pc[w] >= CHECKING -> claim[pair[w]] = FREE
#endif
    :: else
    fi;
    forget(w);
    pc[w] = IDLE
}

/* The first page of the domain that `upto` blocks cover and that is not released; else BLOCKS. */
inline first_locked(d, upto, gg)
{
    k_ = 0;
    do
    :: k_ < (upto) && released[page(d, k_)] == (gg) -> k_++
    :: else -> break
    od;
    if
    :: k_ >= (upto) -> k_ = BLOCKS
    :: else
    fi
}

/* The next domain, from i on, that moved: step `this`. None: from the first that moved, step `then`. */
inline to_moved(w, this, then)
{
    do
    :: i[w] < PER_PAIR && !((moved[w] >> i[w]) & 1) -> i[w]++
    :: else -> break
    od;
    if
    :: i[w] < PER_PAIR -> pc[w] = this
    :: else ->
        i[w] = ((moved[w] & 1) -> 0 : 1);
        pc[w] = then
    fi
}

/* From a domain that has all its blocks to the next; past the last one: publish, or nothing was left. */
inline skip_full(w)
{
    do
    :: i[w] < PER_PAIR && N(w) == BLOCKS -> i[w]++
    :: else -> break
    od;
    if
    :: i[w] < PER_PAIR
    :: else ->
        i[w] = 0;
        if
        :: (moved[w] & 3) == 0 -> pc[w] = GIVING
        :: else ->
            to_moved(w, FIRST, GIVING)
        fi
    fi
}

/* After T_READ, T_RAISE, T_FREE: the same domain's next store that is not there already, else the next
 * domain, else advance. Skipping a store that would not change anything is invisible. */
inline after_take(w)
{
    first_locked(dom(w), N(w), gen[w]);
    if
#ifndef M_TAKEOVER_RELEASE
    :: k_ < BLOCKS -> pc[w] = T_FREE
#endif
    :: else ->
#ifdef M_RESUME_OLDER
        /* Everything as it should be, but hashing goes on from the other copy. */
        x_ = 1 - (newest(dom(w), gen[w]) % 2);
        if
        :: newest(dom(w), gen[w]) == 2
        :: newest(dom(w), gen[w]) < 2 && holds(dom(w), x_, gen[w]) ->
            N(w) = seq[2 * dom(w) + x_] - 1; MID(w) = body[2 * dom(w) + x_]
        :: else -> N(w) = 0; MID(w) = 0
        fi;
#endif
        if
        :: i[w] + 1 < PER_PAIR -> i[w]++; pc[w] = T_READ
        :: else -> i[w] = 0; pc[w] = A_WAIT; skip_full(w)
        fi
    fi
}

/* The block is done in every domain of the pair: go on with the midstate in hand, or give back. */
inline go_on(w)
{
    moved[w] = DONE_ONE;
    i[w] = 0;
    pc[w] = A_WAIT;
    skip_full(w);
    if
    :: pc[w] == GIVING -> clear_midstates(w)
    :: else
    fi
}

/* A store is made in domain i: the same step in the next domain that moved, else what comes after it. */
inline stored(w, this, then)
{
    i[w]++;
    to_moved(w, this, then);
    if
    :: pc[w] == GIVING -> go_on(w)
    :: else
    fi
}

/* The hint may be too low, never too high: where it covers a page nobody looks at VALID of it. */
#if WORKER_COPY == 2
#define KNOWN copied[pair[w]] > N(w) * PER_PAIR + i[w]                  // workers.measure.Measurer._is_known_valid
#define TAKE pc[w] = (copied[pair[w]] < PAIR_PAGES -> F_COPY : T_READ)
#else
#define KNOWN false
#define TAKE pc[w] = T_READ
#endif
#if WORKER_SCRUB
#define DIRTY_LEFT && (slot != SCRUB_GEN || !all_cleaned)
#define CLEANING(p) && (gen[w] != SCRUB_GEN || cleaned[p] < to_clean(p))
#else
#define DIRTY_LEFT
#define CLEANING(p)
#endif

#define early(pg, gg) (block(pg) > 0 && valid[page(domain(pg), block(pg) - 1)] != (gg))

/* The k-th page of the pair is waited for, and this one has the pair's claim and the launch's generation. Looking at
 * VALID of a page is one step with what follows, because only who has the claim stores it. */
#define TOUCH(k) \
    :: d_step { pc[w] == CHECKING && touches > 0 && slot == gen[w] && gen[w] != SCRUB_GEN && \
                valid[of_pair(pair[w], k)] != gen[w] ->                                                          \
        touches--; at[w] = k; pc[w] = U_COPY }

proctype Worker(byte w)
{
end:
    do
#if WORKER_SCRUB
    /* The others have done what this one came for. */
    :: d_step { pc[w] == CLAIMING && gen[w] == SCRUB_GEN && all_cleaned ->
        gen[w] = 0; pc[w] = IDLE }                                      // workers.filling.Filler.step
#endif
    /* Which launch has work: an unsynchronised look, it may be old when the claim is there. */
    :: d_step { pc[w] == IDLE && slot != 0 && fault != slot && (!finished(0, slot) || !finished(PAIRS - 1, slot)) DIRTY_LEFT ->
        gen[w] = slot; pc[w] = CLAIMING }                               // workers.measure.Measurer.step
    :: d_step { pc[w] == CLAIMING && slot != gen[w] ->
        gen[w] = 0; pc[w] = IDLE }                                      // workers.measure.Measurer.step
    :: d_step { pc[w] == CLAIMING && claim[0] == FREE && fault != gen[w] && !finished(0, gen[w]) CLEANING(0) ->
        claim[0] = w + 1; pair[w] = 0; pc[w] = CHECKING }               // shm.launches.Claims.claim
#if PAIRS > 1
    :: d_step { pc[w] == CLAIMING && claim[1] == FREE && fault != gen[w] && !finished(1, gen[w]) CLEANING(1) ->
        claim[1] = w + 1; pair[w] = 1; pc[w] = CHECKING }               // shm.launches.Claims.claim
#endif
    :: d_step { pc[w] == CHECKING ->                                    // workers.measure.Measurer.step
        if
#ifndef M_GENERATION_CHECK
        :: slot != gen[w] -> CHECK(NO_LATE, false); pc[w] = GIVING
#endif
        :: else ->
#if WORKER_SCRUB
            if
            :: gen[w] == SCRUB_GEN -> pc[w] = S_ZERO
            :: else -> TAKE
            fi
#else
            TAKE
#endif
        fi }

#if WORKER_COPY == 2
    /* Filling, one page a claim. Only the holder fills pages of the pair, so looking for the first that is not
     * VALID is one step. */
    :: d_step { pc[w] == F_COPY ->                                      // workers.filling.Filler.fill
        CHECK(STALE, holder == gen[w]);
        k_ = copied[pair[w]];
#ifndef M_RECOPY
        do
        :: k_ < PAIR_PAGES && valid[of_pair(pair[w], k_)] == gen[w] -> k_++
        :: else -> break
        od;
#endif
        at[w] = k_;
        if
        :: k_ < PAIR_PAGES ->
#ifdef M_MARK_FIRST
            copied[pair[w]] = k_ + 1;
            pc[w] = F_LATE
#else
            CHECK(COPIED, valid[of_pair(pair[w], k_)] != gen[w]);
            CHECK(NO_RECOPY, content[of_pair(pair[w], k_)] == ZERO);
            content[of_pair(pair[w], k_)] = image(gen[w], of_pair(pair[w], k_));
            pc[w] = F_VALID
#endif
        :: else -> pc[w] = F_MARK
        fi;
        k_ = 0 }
#ifdef M_MARK_FIRST
    :: d_step { pc[w] == F_LATE ->
        content[of_pair(pair[w], at[w])] = image(gen[w], of_pair(pair[w], at[w]));
        pc[w] = F_VALID }
#endif
    :: d_step { pc[w] == F_VALID ->                                     // shm.epcm.Epcm.set_valid_rows
        CHECK(STALE, holder == gen[w]);
        valid[of_pair(pair[w], at[w])] = gen[w];
        at[w]++;
        pc[w] = F_MARK }
    :: d_step { pc[w] == F_MARK ->                                      // workers.filling.Filler.fill
        CHECK(STALE, holder == gen[w]);
        copied[pair[w]] = at[w];
        clear_midstates(w);
        pc[w] = GIVING }
#endif
#if WORKER_COPY && TOUCHES
    TOUCH(0)                                                            // workers.filling.Filler.fill_touched
#if PER_PAIR * BLOCKS > 1
    TOUCH(1)                                                            // workers.filling.Filler.fill_touched
#endif
#if PER_PAIR * BLOCKS > 2
    TOUCH(2)                                                            // workers.filling.Filler.fill_touched
#endif
#if PER_PAIR * BLOCKS > 3
    TOUCH(3)                                                            // workers.filling.Filler.fill_touched
#endif
    :: d_step { pc[w] == U_COPY ->                                      // workers.filling.fill_rows
        CHECK(STALE, holder == gen[w]);
        CHECK(COPIED, valid[of_pair(pair[w], at[w])] != gen[w]);
        content[of_pair(pair[w], at[w])] = image(gen[w], of_pair(pair[w], at[w]));
        pc[w] = U_VALID }
    :: d_step { pc[w] == U_VALID ->                                     // shm.epcm.Epcm.set_valid_rows
        CHECK(STALE, holder == gen[w]);
        CHECK(NO_AHEAD, !early(of_pair(pair[w], at[w]), gen[w]));
        valid[of_pair(pair[w], at[w])] = gen[w];
        clear_midstates(w);
        pc[w] = GIVING }
#endif
#if WORKER_SCRUB
    :: d_step { pc[w] == S_ZERO ->                                      // workers.filling.zero_rows
        CHECK(STALE, holder == gen[w]);
        if
        :: cleaned[pair[w]] < to_clean(pair[w]) ->
            content[of_pair(pair[w], cleaned[pair[w]])] = ZERO; pc[w] = S_MARK
        :: else -> pc[w] = GIVING
        fi }
    :: d_step { pc[w] == S_MARK ->                                      // workers.filling.Filler.fill
        CHECK(STALE, holder == gen[w]);
        cleaned[pair[w]]++;
        pc[w] = GIVING }
#endif

    /* Taking over. Only the holder of the claim writes results, so reading both copies is one step. */
    :: d_step { pc[w] == T_READ ->                                      // workers.measure.Measurer._take_over, shm.smc.Smc.newest
        N(w) = covered(dom(w), gen[w]);
        x_ = newest(dom(w), gen[w]);
        MID(w) = (x_ == 2 -> 0 : body[2 * dom(w) + (x_ % 2)]);
        CHECK(NO_TORN, !(x_ < 2 && seq[2 * dom(w) + 1 - x_] == seq[2 * dom(w) + x_] + 1));
        CHECK(NO_TAKEOVER, crashes == CRASHES || N(w) == 0 || N(w) == BLOCKS);
        if
#ifndef M_FAULT_CHECK
        :: N(w) < blocks_released[dom(w)] -> pc[w] = T_FAULT
#endif
        :: N(w) > blocks_released[dom(w)] -> pc[w] = T_RAISE
        :: else -> after_take(w)
        fi }
    :: d_step { pc[w] == T_RAISE ->                                     // shm.smc.Smc.raise_released
        CHECK(STALE, holder == gen[w]);
        blocks_released[dom(w)] = N(w);
        after_take(w) }
    :: d_step { pc[w] == T_FREE ->                                      // shm.epcm.Epcm.release_rows
        CHECK(STALE, holder == gen[w]);
        first_locked(dom(w), N(w), gen[w]);
        released[page(dom(w), k_)] = gen[w];
        after_take(w) }
    :: d_step { pc[w] == T_FAULT ->                                     // workers.measure.Measurer._take_over
        CHECK(STALE, holder == gen[w]);
        fault = gen[w];
        clear_midstates(w);
        pc[w] = GIVING }

    /* Advancing. The wait for VALID ends when the slot's generation is no longer the worker's own. */
    :: d_step { pc[w] == A_WAIT && slot != gen[w] ->                    // workers.measure.Measurer._advance
        clear_midstates(w); pc[w] = GIVING }
#ifdef M_WAIT_VALID
    :: d_step { pc[w] == A_WAIT -> pc[w] = A_HASH }
#elif defined(M_VALID_LAST)     /* the last page of what could be hashed tells of those before it */
    :: d_step { pc[w] == A_WAIT && valid[page(dom(w), BLOCKS - 1)] == gen[w] -> pc[w] = A_HASH }
#else
    :: d_step { pc[w] == A_WAIT && (KNOWN || valid[page(dom(w), N(w))] == gen[w]) -> // workers.measure.Measurer._advance
        pc[w] = A_HASH }
#endif
#if WORKER_COPY == 1
    :: d_step { pc[w] == A_WAIT && slot == gen[w] && valid[page(dom(w), N(w))] != gen[w] ->
        pc[w] = A_COPY }                                                // workers.filling.Filler.fill
    :: d_step { pc[w] == A_COPY ->                                      // workers.filling.fill_rows
        CHECK(STALE, holder == gen[w]);
        CHECK(NO_RECOPY, content[page(dom(w), N(w))] == ZERO);
#ifdef M_VALID_FIRST
        valid[page(dom(w), N(w))] = gen[w];
#else
        content[page(dom(w), N(w))] = image(gen[w], page(dom(w), N(w)));
#endif
        pc[w] = A_VALID }
    :: d_step { pc[w] == A_VALID ->                                     // shm.epcm.Epcm.set_valid_rows
        CHECK(STALE, holder == gen[w]);
#ifdef M_VALID_FIRST
        content[page(dom(w), N(w))] = image(gen[w], page(dom(w), N(w)));
#else
        valid[page(dom(w), N(w))] = gen[w];
#endif
        pc[w] = A_HASH }
#endif
    :: d_step { pc[w] == A_HASH ->                                      // workers.measure.Measurer._advance
        x_ = content[page(dom(w), N(w))];
        CHECK(R1, holder != gen[w] || x_ != ZERO);
        CHECK(R2, holder != gen[w] || x_ == ZERO || x_ == image(gen[w], page(dom(w), N(w))));
        CHECK(NO_PARALLEL, pc[1 - w] != A_HASH);
        MID(w) = MID(w) + (x_ << (2 * N(w)));
        N(w) = N(w) + 1;
        moved[w] = (moved[w] & 3) | (1 << i[w]);
        i[w]++;
        pc[w] = A_WAIT;
        skip_full(w) }
    /* A result: body, sequence, checksum, into the copy that is not the newest valid one. */
    :: d_step { pc[w] == A_BODY ->                                      // shm.smc.Smc.publish
        CHECK(STALE, holder == gen[w]);
        body[2 * dom(w) + older(dom(w), gen[w])] = MID(w);
        pc[w] = A_SEQ }
    :: d_step { pc[w] == A_SEQ ->                                       // shm.smc.Smc.publish
        CHECK(STALE, holder == gen[w]);
        seq[2 * dom(w) + older(dom(w), gen[w])] = N(w) + 1;
        pc[w] = A_SUM }
    :: d_step { pc[w] == A_SUM ->                                       // shm.smc.Smc.publish
        CHECK(STALE, holder == gen[w]);
        sum[2 * dom(w) + older(dom(w), gen[w])] = SUM(MID(w), N(w) + 1, SEED(w));
        stored(w, A_BODY, AFTER_SUM) }
    :: d_step { pc[w] == A_RAISE ->                                     // shm.smc.Smc.raise_released
        CHECK(STALE, holder == gen[w]);
        blocks_released[dom(w)] = N(w);
        stored(w, A_RAISE, AFTER_RAISE) }
    :: d_step { pc[w] == A_FREE ->                                      // shm.epcm.Epcm.release_rows
        CHECK(STALE, holder == gen[w]);
        released[page(dom(w), N(w) - 1)] = gen[w];
        stored(w, A_FREE, AFTER_FREE) }
    :: d_step { pc[w] == GIVING ->                                      // shm.launches.Claims.give_back
        claim[pair[w]] = FREE;
        forget(w);
        pc[w] = IDLE }
    /* A stripe may end after each block, and holds at least one. */
#ifdef M_EMPTY_STRIPE
    :: d_step { pc[w] == A_WAIT && (moved[w] & 3) == 0 ->
#else
    :: d_step { pc[w] == A_WAIT && moved[w] == DONE_ONE ->         // workers.measure.Measurer.step
#endif
        clear_midstates(w); pc[w] = GIVING }

    /* Death by any cause, and a stop from which nobody wakes it. */
    :: d_step { pc[w] != IDLE && pc[w] != STOPPED && crashes > 0 -> crashes--; die(w) }
    :: d_step { pc[w] >= CHECKING && pc[w] != STOPPED && stops > 0 ->
        stops--; gen[w] = 0; clear_midstates(w); pc[w] = STOPPED }
    od
}

/* ---------------------------------------------------------------- host */
#if PAIRS == 2
#define range_free (claim[0] == FREE && claim[1] == FREE)
#else
#define range_free (claim[0] == FREE)
#endif

/* A deadline passes only when a worker is stopped for good: one that would kill a healthy worker is a
 * crash, and what cannot end without it counts as a hang. */
#define KILL_STOPPED(w) \
    :: d_step { pc[w] == STOPPED -> CHECK(NO_KILL, false); die(w) }

inline take_range()
{
    do
    :: d_step { range_free -> claim[0] = HOST; claim[PAIRS - 1] = HOST } -> break // shm.launches.Claims.take_range
#ifndef M_RANGE_DEADLINE
    KILL_STOPPED(0)                                                     // runtime.arena.Arena.take_range
    KILL_STOPPED(1)                                                     // runtime.arena.Arena.take_range
#endif
    od
}

inline give_range()
{
    d_step { claim[0] = FREE; claim[PAIRS - 1] = FREE }                 // shm.launches.Claims.give_back
}

/* Whatever stands in the buffer goes to the caller. */
inline deliver(l)
{
    d_step {
        CHECK(HELD, out == 0 || verified);
        CHECK(FOREIGN, (out & ~(1 << (l - 1))) == 0 && (enclave[l] != DONE || out != 0));
        out = 0
    }
}

#define final(d, l) ((d) >= DOMAINS || covered((d) % DOMAINS, l) == BLOCKS)
#define all_final(l) (final(0, l) && final(1, l) && final(2, l) && final(3, l))

/* Final results do not change any more, so reading them all is one step. */
inline merge(l)
{
    d_step {
        d_ = 0;
        k_ = 1;
        do
        :: d_ < DOMAINS ->
            x_ = 0;
            do
            :: x_ < BLOCKS ->
                CHECK(ONCE, ((body[2 * d_ + newest(d_, l) % 2] >> (2 * x_)) & 3) == image(l, page(d_, x_)));
                if
                :: ((body[2 * d_ + newest(d_, l) % 2] >> (2 * x_)) & 3) != GOOD -> k_ = 0
                :: else
                fi;
                x_++
            :: else -> break
            od;
            d_++
        :: else -> break
        od;
        if
        :: k_ == 1 ->
            CHECK(FORGED, !tampered(l));
            CHECK(NO_VERIFIED, false);
            CHECK(NO_LEFTOVER, finished(0, l) && finished(PAIRS - 1, l));
            verified = true
        :: else ->
            CHECK(GENUINE, tampered(l));
            CHECK(NO_REJECTED, false)
        fi;
        d_ = 0; x_ = 0; k_ = 0
    }
}

active proctype Host()
{
    byte l = 1;
    byte pg;
#if TOUCHES && !WORKER_COPY
    byte next;
#endif

    atomic { run Worker(0); run Worker(1) }
    do
    :: l > LAUNCHES -> break
    :: else ->
        /* The enclave starts at once, before anything is there. */
        atomic { enclave[l] = RUN; run Enclave(l) }                     // runtime.session.Session.start
        /* No entry is VALID for this launch, so nobody acts on the fields: all of them in one step. */
        d_step {                                                        // shm.epcm.Epcm.describe
            pg = 0;
            do
            :: pg <= PAGES -> owner_of[pg] = l; pg++
            :: else -> break
            od;
            pg = 0
        }
#ifndef M_OPEN_RANGE
        take_range();                                                   // runtime.startup.Start.open
#endif
        holder = l;
#ifdef M_OPEN_FIRST
        slot = l;
#endif
#ifndef M_RESET
        d_step {                                                        // shm.smc.Smc.reset
            d_ = 0;
            do
            :: d_ < DOMAINS -> blocks_released[d_] = 0; d_++
            :: else -> break
            od;
            d_ = 0;
#if WORKER_COPY == 2
            copied[0] = 0; copied[PAIRS - 1] = 0;
#endif
            fault = 0
        }
#endif
#ifndef M_OPEN_FIRST
        slot = l;                                                       // shm.launches.LaunchTable.open_launch
#endif
#ifndef M_OPEN_RANGE
        give_range();                                                   // shm.launches.LaunchTable.open_launch
#endif

#if WORKER_COPY
        pg = HEAP;
#endif
        do
        :: pg > PAGES -> break
#if TOUCHES && !WORKER_COPY
        /* One of the pages that come later is waited for. */
        :: touches > 0 && pg + 1 < PAGES ->
            atomic {
                touches--;
                next = pg + 1;
                do
                :: next + 1 < PAGES -> next++
                :: break
                od
            }
            if
            :: valid[next] != l ->
                content[next] = image(l, next);                         // runtime.startup.Start.copy_all
                CHECK(NO_AHEAD, !early(next, l));
                valid[next] = l                                         // shm.epcm.Epcm.set_valid
            :: else
            fi;
            next = 0
#ifdef M_RECOPY
        :: pg < PAGES ->
#else
        :: pg < PAGES && valid[pg] == l -> pg++                         // runtime.startup.Start.copy_all
        :: pg < PAGES && valid[pg] != l ->
#endif
            CHECK(COPIED, valid[pg] != l);
#else
        :: pg < PAGES ->
#endif
#ifdef M_VALID_FIRST
            valid[pg] = l;
            content[pg] = image(l, pg);
#else
            content[pg] = image(l, pg);                                 // runtime.startup.Start.copy
            valid[pg] = l;                                              // shm.epcm.Epcm.set_valid
#endif
            pg++
        :: pg == HEAP ->
            d_step { CHECK(ZEROED, content[pg] == ZERO); valid[pg] = l; pg++ }  // shm.epcm.Epcm.set_valid
        :: d_step { aborts > 0 -> aborts-- }; goto destroy              // runtime.startup.Start.abort_copy
        od;

        do
        :: d_step { fault == l -> CHECK(GENUINE, tampered(l)) }; goto destroy   // runtime.startup.Start.await_measured
        :: all_final(l) -> break                                        // runtime.startup.Start.await_measured
#ifdef M_OUTPUT_HOLD
        :: out != 0 -> deliver(l)
#endif
#ifndef M_PROGRESS_DEADLINE
        KILL_STOPPED(0)                                                 // runtime.startup.Start.await_measured
        KILL_STOPPED(1)                                                 // runtime.startup.Start.await_measured
#endif
        :: d_step { aborts > 0 -> aborts-- }; goto destroy              // runtime.startup.Start.cancel
        od;
        merge(l);                                                       // runtime.startup.Start.merge
        if
        :: !verified -> goto destroy                                    // runtime.startup.Start.verify
        :: else
        fi;
        do
        :: enclave[l] == DONE || enclave[l] == NONE -> deliver(l); break    // runtime.session.Session.release
#ifndef M_PROGRESS_DEADLINE
        KILL_STOPPED(0)                                                 // runtime.startup.Start.await_measured
        KILL_STOPPED(1)                                                 // runtime.startup.Start.await_measured
#endif
        od;

destroy:
        pg = 0;
        verified = false;
#ifdef M_DROP_FIRST
        out = 0;
#endif
        d_step {                                                        // runtime.processes.Zygote.end
            if
            :: enclave[l] != NONE -> enclave[l] = DYING
            :: else
            fi
        }
#ifndef M_WAIT_GONE
        enclave[l] == NONE;                                             // runtime.processes.Zygote.end
#endif
#ifndef M_DROP_FIRST
        out = 0;                                                        // runtime.session.Session.close
#endif
#if !defined(M_ZERO_FIRST) && !defined(M_ZERO_BEFORE_FREE)
        slot = 0;                                                       // shm.launches.LaunchTable.close_launch
#endif
        CHECK(NO_CAUGHT, range_free);
#ifndef M_CLOSE_RANGE
        take_range();                                                   // runtime.arena.Arena.reclaim
#endif
        holder = 0;
#if WORKER_SCRUB
        /* Entries first: no enclave is left that could look at them. Then a scrubbing takes slot and pages. */
        d_step {                                                        // shm.epcm.Epcm.clear
            do
            :: pg <= PAGES -> owner_of[pg] = 0; pg++
            :: else -> break
            od;
            pg = 0;
            cleaned[0] = 0; cleaned[PAIRS - 1] = 0
        }
        holder = SCRUB_GEN;
        slot = SCRUB_GEN;                                               // shm.launches.LaunchTable.open_launch
        give_range();
        do
        :: all_cleaned -> break                                         // runtime.arena.Arena.collect
        KILL_STOPPED(0)                                                 // runtime.arena.Arena.take_range
        KILL_STOPPED(1)                                                 // runtime.arena.Arena.take_range
        od;
        slot = 0;                                                       // shm.launches.LaunchTable.close_launch
#ifndef M_SCRUB_RANGE
        take_range();                                                   // runtime.arena.Arena.collect
#endif
        holder = 0;
#else
#ifndef M_SCRUB
        /* Nobody is left who looks at these pages (STALE and OWN would tell), so this is one step. */
        d_step {                                                        // runtime.arena.Arena.reclaim
            do
            :: pg <= PAGES -> content[pg] = ZERO; pg++
            :: else -> break
            od;
            pg = 0
        }
#endif
        /* Only the generation goes: stale `valid` and `released` are the harder case. */
        d_step {                                                        // shm.epcm.Epcm.clear
            do
            :: pg <= PAGES -> owner_of[pg] = 0; pg++
            :: else -> break
            od;
            pg = 0
        }
#endif
#ifdef M_ZERO_FIRST
        slot = 0;
#endif
#ifndef M_CLOSE_RANGE
        give_range();                                                   // shm.launches.LaunchTable.close_launch
#endif
#ifdef M_ZERO_BEFORE_FREE
        slot = 0;
#endif
        l++
    od
}
