//! A thread that asks the driver how far calls are, for a thread that must not: while one thread frees memory the driver may
//! answer no other, and what frees waits for the device, perhaps for the very call that is to be given up.
//!
//! - **Q1** whoever wants to know waits [`PATIENCE`] for an answer, and never for the driver; one that comes later is had with
//!   the next question.
//! - **Q2** an answer keeps nothing alive of the calls it was asked about, but for those it names.
//! - **Q3** the driver is asked in relaxed capture mode, as everywhere, so that graphs captured elsewhere are left alone.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use smddp_core::{Error, Result};

use crate::device::Device;
use crate::life::Life;

/// How long an answer is waited for. Frees of memory mostly take less.
const PATIENCE: Duration = Duration::from_secs(1);

type Calls = Vec<Arc<Life>>;

pub(crate) struct Asker {
    questions: mpsc::Sender<Calls>,
    answers: mpsc::Receiver<Result<Calls>>,
    /// A question was not answered yet.
    is_waiting: bool,
}

impl Asker {
    /// The thread ends when this is dropped, as soon as the driver lets it.
    pub(crate) fn start(device: &Arc<Device>, limit: Duration) -> Result<Asker> {
        let (tell, told) = mpsc::channel();
        let (questions, asked) = mpsc::channel();
        let (answer, answers) = mpsc::channel();
        let device = Arc::clone(device);
        let run = move || {
            let entered = device.enter();
            let is_ready = entered.is_ok();
            // Who asked may have given up.
            if tell.send(entered).is_ok() && is_ready {
                serve(&asked, &answer);
            }
        };
        std::thread::Builder::new()
            .name("smddp-nccl-ask".to_owned())
            .spawn(run)
            .map_err(|e| no_thread(&e.to_string()))?;
        told.recv_timeout(limit).map_err(|_| no_thread("a new thread did not run"))??;
        Ok(Asker { questions, answers, is_waiting: false })
    }

    /// Those of `calls`, or of an earlier question's, that the device is past, as far as the driver says in time (Q1).
    pub(crate) fn past(&mut self, calls: Calls) -> Result<Calls> {
        let ended = || Error::Internal("the thread that asks about calls of NCCL panicked".to_owned());
        if !self.is_waiting {
            self.questions.send(calls).map_err(|_| ended())?;
            self.is_waiting = true;
        }
        match self.answers.recv_timeout(PATIENCE) {
            Ok(answer) => {
                self.is_waiting = false;
                answer
            }
            Err(mpsc::RecvTimeoutError::Timeout) => Ok(Vec::new()),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(ended()),
        }
    }
}

fn serve(asked: &mpsc::Receiver<Calls>, answer: &mpsc::Sender<Result<Calls>>) {
    for calls in asked {
        let is_past = |call: Arc<Life>| match call.is_past() {
            Ok(true) => Some(Ok(call)),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        };
        // By value, so that the rest is let go first (Q2).
        let past = calls.into_iter().filter_map(is_past).collect();
        if answer.send(past).is_err() {
            return;
        }
    }
}

/// Why nobody can watch over NCCL.
pub(crate) fn no_thread(reason: &str) -> Error {
    Error::Resource {
        what: "watching NCCL".to_owned(),
        resource: "threads",
        reason: reason.to_owned(),
        hint: "Raise the process limit (ulimit -u)".to_owned(),
    }
}
