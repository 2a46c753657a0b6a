//! ncclGroupStart and ncclGroupEnd: what one thread calls between them is done at the end, together.

use crate::comm::Comm;
use crate::error::{Code, Error, Result};
use crate::operation::Operation;
use std::cell::RefCell;
use std::sync::Arc;

type Later = Box<dyn FnOnce() -> Result>;

struct Batch {
    comm: Arc<Comm>,
    operations: Vec<Operation>,
    streams: Vec<usize>,
}

#[derive(Default)]
struct Group {
    depth: u32,
    error: Option<Error>,
    batches: Vec<Batch>,
    later: Vec<Later>,
}

thread_local! {
    static GROUP: RefCell<Group> = RefCell::default();
}

pub fn start() {
    GROUP.with_borrow_mut(|group| group.depth += 1);
}

pub fn is_open() -> bool {
    GROUP.with_borrow(|group| group.depth > 0)
}

/// A call within a group failed: the group does nothing.
pub fn spoil(error: &Error) {
    GROUP.with_borrow_mut(|group| {
        if group.depth > 0 {
            group.error.get_or_insert_with(|| error.clone());
        }
    });
}

pub fn add(comm: Arc<Comm>, operation: Operation, stream: usize) -> Result {
    if !is_open() {
        return comm.launch(vec![operation], &[stream]);
    }
    GROUP.with_borrow_mut(|group| {
        let found = group.batches.iter_mut().find(|batch| Arc::ptr_eq(&batch.comm, &comm));
        match found {
            Some(batch) => {
                batch.operations.push(operation);
                if !batch.streams.contains(&stream) {
                    batch.streams.push(stream);
                }
            }
            None => {
                group.batches.push(Batch { comm, operations: vec![operation], streams: vec![stream] });
            }
        }
    });
    Ok(())
}

/// Waiting for peers would block a group whose other calls they wait for.
pub fn later_or_now(work: Later) -> Result {
    if !is_open() {
        return work();
    }
    GROUP.with_borrow_mut(|group| group.later.push(work));
    Ok(())
}

pub fn end() -> Result {
    let group = GROUP.with_borrow_mut(|group| match group.depth {
        0 => Err(Error::new(
            Code::INVALID_USAGE,
            "ncclGroupEnd: not in a group call, there is no ncclGroupStart for it",
        )),
        1 => Ok(Some(std::mem::take(group))),
        _ => {
            group.depth -= 1;
            Ok(None)
        }
    })?;
    let Some(group) = group else { return Ok(()) };
    // Joins were begun already, and must end whatever else went wrong.
    let joined = group.later.into_iter().map(|work| work()).fold(Ok(()), Result::and);
    group.error.map_or(Ok(()), Err)?;
    joined?;
    let mut outcome = Ok(());
    for batch in group.batches {
        match batch.comm.launch(batch.operations, &batch.streams) {
            Err(error) if error.code == Code::IN_PROGRESS => outcome = Err(error),
            launched => launched?,
        }
    }
    outcome
}
