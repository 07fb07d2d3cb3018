"""Every Redis key of the service, and how long each lives.

    {p}:jobs:{model}         stream    queue, read by consumer group `workers`; entry field `job_id`
                                       says which job brought the entry (`lua/order.lua`)
    {p}:models               set       models that ever had a job
    {p}:job:{id}             hash      state, attempt, entry_id, worker, request
                                       (JobRequest JSON), owner, length and priority
                                       (`lua/order.lua`), limits and taken (`lua/limits.lua`),
                                       next_index, sampler_version (of what is published), times
                                       (ms), ...; of blame:
                                       is_in_engine (of the attempt), deliveries, deaths, losses,
                                       lost:{attempt}, is_suspect; TTL after the job's end
    {p}:events:{id}          stream    the answer as it grew, field `event`; TTL after the job's end
    {p}:kept:{id}            string    what it kept, token by token, where it was asked for; TTL
                                       after the job's end
    {p}:places:{model}       zset      job_id -> lease end (ms) of those reserved or reading,
                                       whose API renews the lease
    {p}:place_owners:{model} hash      job_id -> owner, of places taken and queued jobs; TTL
    {p}:owner_places:{model} zset      owner -> how many of those are the owner's; TTL
    {p}:more_places:{model}  hash      job_id -> `number owner` of places beyond a large job's first
                                       one; '' -> the sum of the numbers; TTL
    {p}:queued:{model}       zset      job_id -> time of queueing (ms), waiting for a worker
    {p}:order:{model}        zset      `owner job_id` -> when its turn is, of those that wait; below
                                       0 if it was handed back, above 2^46 if it stands behind those
                                       of its owner that have their turns (`lua/order.lua`)
    {p}:share:{model}:{owner} zset     `job_id length` -> rank of its priority and arrival, of an
                                       owner's waiting jobs (`lua/share.lua`); TTL
    {p}:tags:{model}         hash      now -> virtual time of that order; owner:{owner} -> when the
                                       owner's last job will have had its share; ahead:{owner} ->
                                       how many of its jobs have their turns, where some have none;
                                       passed:{owner} -> how often in a row its oldest was passed
                                       over; has_share:{owner}; arrivals -> jobs so far; TTL
    {p}:given:{model}        hash      entry -> job_id, of entries that were given to another job
                                       than the one which brought them; TTL
    {p}:arrivals:{model}     list      times (ms) at which the last jobs were queued, without
                                       those of low priority; TTL
    {p}:starts:{model}       list      times (ms) at which the last jobs left the queue; TTL
    {p}:pace:{model}         list      those since which some have waited all the time; TTL
    {p}:live                 zset      job_id -> deadline (ms) of all jobs without an end
    {p}:ended_jobs           zset      job_id -> end of TTL (ms) of ended jobs whose record is there
    {p}:ended_sizes          hash      job_id -> bytes of an ended job's record, events, kept sets
    {p}:ended_bytes          string    sum of ended_sizes; over the budget the oldest go first, of
                                       the owner whose jobs take most
    {p}:ended_of_jobs        hash      job_id -> `bytes owner` of an ended job; TTL
    {p}:ended_owners         zset      owner -> bytes of its ended jobs; TTL
    {p}:ended_of:{owner}     zset      job_id -> end of TTL (ms) of an owner's ended jobs; TTL
    {p}:dead                 stream    dead letters, capped
    {p}:idempotency:{hash}   hash      fingerprint, job_id; TTL
    {p}:frames:{digest}      string    frames blob
    {p}:frame_upload:{id}    string    frames blob on its way in, by the job that it is for; TTL
    {p}:frame_sizes          hash      digest -> bytes, or those reserved for a blob that is being
                                       read
    {p}:frame_bytes          string    sum of frame_sizes
    {p}:frame_uses           zset      digest -> last use (ms)
    {p}:frame_pins:{digest}  set       job ids that still need the blob; a pin counts while its job
                                       is in `live`
    {p}:frame_videos         hash      digest -> the video that the blob is of, as caches name it
    {p}:video_frames:{video} set       digests of the blobs of a video
    {p}:forgotten            zset      video -> time (ms) at which it was deleted: what live jobs
                                       still need of it goes when they end; for a day
    {p}:forgettings          stream    the same for workers, field `video`; capped
    {p}:alias:{hash}         string    id of the video that an owner calls so; TTL
    {p}:aliases:{owner}      zset      hash -> last use (s), of an owner's aliases; capped; TTL
    {p}:owner_jobs:{owner}   zset      job_id -> 0 while it waits for a worker, else the time (ms)
                                       of its start; of an owner's live jobs; TTL
    {p}:bucket:{owner}:{kind} hash     of `tokens` or `frames`: level, at (ms), last (what the last
                                       job took); TTL: the time until it is full
    {p}:owner_limits:{owner} string    as of the owner's last request (`lua/limits.lua`); TTL
    {p}:link_secret          string    random bytes that links are signed with
    {p}:usage:{owner}:{day}  hash      what an owner's jobs took on a day (since 1970); TTL
    {p}:worker:{id}          string    ModelCard JSON, TTL = heartbeat
    {p}:workers              set       worker ids; one whose card is gone is dropped by readers
    {p}:lost_worker:{id}     hash      of a worker that is gone: fate, as its supervisor saw it;
                                       job:{id} -> the attempt that was lost with it; TTL
    {p}:ended                channel   id of a job that ended otherwise than by its worker
    {p}:news                 channel   a line for each job that events were just appended to: its
                                       id, and perhaps the event (`lua/append.lua`)

Times are Redis' own clock, deadlines the API's. Lua scripts touch several of these at once (one
Redis, no Cluster) and derive the names from the prefix: `lua/prelude.lua` repeats this list.
"""

from dataclasses import dataclass

GROUP = "workers"


@dataclass(frozen=True, slots=True)
class RedisKeys:
    prefix: str = "dycoke"

    def jobs(self, model: str) -> str:
        return f"{self.prefix}:jobs:{model}"

    @property
    def models(self) -> str:
        return f"{self.prefix}:models"

    def job(self, job_id: str) -> str:
        return f"{self.prefix}:job:{job_id}"

    def events(self, job_id: str) -> str:
        return f"{self.prefix}:events:{job_id}"

    def kept(self, job_id: str) -> str:
        return f"{self.prefix}:kept:{job_id}"

    def places(self, model: str) -> str:
        return f"{self.prefix}:places:{model}"

    def place_owners(self, model: str) -> str:
        return f"{self.prefix}:place_owners:{model}"

    def owner_places(self, model: str) -> str:
        return f"{self.prefix}:owner_places:{model}"

    def more_places(self, model: str) -> str:
        return f"{self.prefix}:more_places:{model}"

    def queued(self, model: str) -> str:
        return f"{self.prefix}:queued:{model}"

    def order(self, model: str) -> str:
        return f"{self.prefix}:order:{model}"

    def tags(self, model: str) -> str:
        return f"{self.prefix}:tags:{model}"

    def share(self, model_and_owner: str) -> str:
        return f"{self.prefix}:share:{model_and_owner}"

    def given(self, model: str) -> str:
        return f"{self.prefix}:given:{model}"

    def arrivals(self, model: str) -> str:
        return f"{self.prefix}:arrivals:{model}"

    def starts(self, model: str) -> str:
        return f"{self.prefix}:starts:{model}"

    def pace(self, model: str) -> str:
        return f"{self.prefix}:pace:{model}"

    @property
    def live(self) -> str:
        return f"{self.prefix}:live"

    @property
    def ended_jobs(self) -> str:
        return f"{self.prefix}:ended_jobs"

    @property
    def ended_sizes(self) -> str:
        return f"{self.prefix}:ended_sizes"

    @property
    def ended_bytes(self) -> str:
        return f"{self.prefix}:ended_bytes"

    @property
    def ended_of_jobs(self) -> str:
        return f"{self.prefix}:ended_of_jobs"

    @property
    def ended_owners(self) -> str:
        return f"{self.prefix}:ended_owners"

    def ended_of(self, owner: str) -> str:
        return f"{self.prefix}:ended_of:{owner}"

    @property
    def dead(self) -> str:
        return f"{self.prefix}:dead"

    def idempotency(self, key_hash: str) -> str:
        return f"{self.prefix}:idempotency:{key_hash}"

    def frames(self, digest: str) -> str:
        return f"{self.prefix}:frames:{digest}"

    def frame_upload(self, job_id: str) -> str:
        return f"{self.prefix}:frame_upload:{job_id}"

    @property
    def frame_sizes(self) -> str:
        return f"{self.prefix}:frame_sizes"

    @property
    def frame_bytes(self) -> str:
        return f"{self.prefix}:frame_bytes"

    @property
    def frame_uses(self) -> str:
        return f"{self.prefix}:frame_uses"

    def frame_pins(self, digest: str) -> str:
        return f"{self.prefix}:frame_pins:{digest}"

    @property
    def frame_videos(self) -> str:
        return f"{self.prefix}:frame_videos"

    def video_frames(self, video: str) -> str:
        return f"{self.prefix}:video_frames:{video}"

    @property
    def forgotten(self) -> str:
        return f"{self.prefix}:forgotten"

    @property
    def forgettings(self) -> str:
        return f"{self.prefix}:forgettings"

    def alias(self, alias_hash: str) -> str:
        return f"{self.prefix}:alias:{alias_hash}"

    def aliases(self, owner: str) -> str:
        return f"{self.prefix}:aliases:{owner}"

    def owner_jobs(self, owner: str) -> str:
        return f"{self.prefix}:owner_jobs:{owner}"

    def bucket(self, owner_and_kind: str) -> str:
        return f"{self.prefix}:bucket:{owner_and_kind}"

    def owner_limits(self, owner: str) -> str:
        return f"{self.prefix}:owner_limits:{owner}"

    @property
    def link_secret(self) -> str:
        return f"{self.prefix}:link_secret"

    def usage(self, owner_and_day: str) -> str:
        return f"{self.prefix}:usage:{owner_and_day}"

    def worker(self, worker_id: str) -> str:
        return f"{self.prefix}:worker:{worker_id}"

    @property
    def workers(self) -> str:
        return f"{self.prefix}:workers"

    def lost_worker(self, worker_id: str) -> str:
        return f"{self.prefix}:lost_worker:{worker_id}"

    @property
    def ended(self) -> str:
        return f"{self.prefix}:ended"

    @property
    def news(self) -> str:
        return f"{self.prefix}:news"
