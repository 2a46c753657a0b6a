//! From the names of hosts to their addresses, with a limit: the name service has none of its own, and two name servers
//! that are gone cost ten seconds and more.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use smddp_core::interrupt;

/// What gives the addresses of a name, with port 0. It may take as long as it likes.
pub(crate) type Resolver = Arc<dyn Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync>;

type Answer = io::Result<Vec<SocketAddr>>;

pub(crate) const NOT_YET: &str = "the name service has not answered in time (see /etc/resolv.conf; an IP address in place of the name needs none)";

/// The system's name service.
pub(crate) fn system() -> Resolver {
    Arc::new(|name| (name, 0).to_socket_addrs().map(Iterator::collect))
}

/// The addresses of one host.
pub(crate) struct Lookup {
    name: String,
    resolver: Resolver,
    /// A question without an answer yet. It is waited for again, never asked a second time meanwhile: the limit of a wait may
    /// be shorter than any answer takes, and the threads that ask would pile up.
    asked: Option<Receiver<Answer>>,
}

impl Lookup {
    pub(crate) fn new(name: &str, resolver: &Resolver) -> Lookup {
        Lookup { name: name.to_owned(), resolver: Arc::clone(resolver), asked: None }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Asks, or goes on waiting for what was asked before, until `limit`. Every answer is given once; the next call asks
    /// anew, since names come and go while a job starts.
    ///
    /// # Errors
    /// [`NOT_YET`] at the limit: the thread that asks is left behind, and ends with its answer.
    pub(crate) fn addresses(&mut self, limit: Instant) -> Answer {
        if let Ok(ip) = self.name.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, 0)]);
        }
        let asked = match self.asked.take() {
            Some(asked) => asked,
            None => self.ask()?,
        };
        let answer = loop {
            let left = limit.saturating_duration_since(Instant::now());
            match asked.recv_timeout(interrupt::slice(left)) {
                Err(RecvTimeoutError::Timeout) if !left.is_zero() && !interrupt::came() => {}
                answer => break answer,
            }
        };
        match answer {
            Ok(Ok(addresses)) if addresses.is_empty() => {
                Err(io::Error::other(format!("'{}' has no address", self.name)))
            }
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => {
                self.asked = Some(asked);
                Err(io::Error::new(io::ErrorKind::TimedOut, NOT_YET))
            }
            Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the lookup of the name panicked")),
        }
    }

    fn ask(&self) -> io::Result<Receiver<Answer>> {
        let (sender, asked) = channel();
        let (name, resolver) = (self.name.clone(), Arc::clone(&self.resolver));
        std::thread::Builder::new().name("smddp-lookup".to_owned()).spawn(move || {
            // Nobody may be waiting any more.
            let _ = sender.send(resolver(&name));
        })?;
        Ok(asked)
    }
}
