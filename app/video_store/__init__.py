"""Uploaded videos on disk, by content, each visible to the owners that have uploaded it.

    {directory}/vid_<sha256>                        a video; its modification time is its last use
    {directory}/owners/<owner>/vid_<sha256>.json    a reference: what this owner may know of it; its
                                                    modification time is this owner's last use
    {directory}/vid_<sha256>.json                   the same where there are no keys
    {directory}/incoming/<random>                   uploads under way
    {directory}/.lock                               held while one is stored or removed

Owners share bytes and nothing else: a video without a reference of theirs is not there. It goes
with its last reference.

Several API processes, of one machine or several, may share the directory. Every user of a file
holds a shared `flock` on it, and no video is removed without the exclusive one, so neither eviction
nor DELETE takes one from under a live job, in this process or another; a lock ends with its
process.

An upload evicts nothing while it comes in: uploads under way have their own budget. It
takes its place when it is committed, and then its owner's quota and the store's budget are kept.

Knows neither HTTP nor what a video is. No client's file name is kept.
"""

from app.video_store.incoming import Upload
from app.video_store.store import VideoStore
from app.video_store.types import (
    FOREVER,
    NO_STORAGE_QUOTA,
    VIDEO_ID,
    Retention,
    StorageQuota,
    StoredVideo,
    VideoLease,
)

__all__ = [
    "FOREVER",
    "NO_STORAGE_QUOTA",
    "VIDEO_ID",
    "Retention",
    "StorageQuota",
    "StoredVideo",
    "Upload",
    "VideoLease",
    "VideoStore",
]
