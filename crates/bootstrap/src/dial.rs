//! Connects to an address within a time limit, and not beyond an [`interrupt`]: packets to an address may be swallowed.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with, sockopt};
use smddp_core::interrupt;

/// # Errors
/// Those of the connection; `TimedOut` at the limit.
pub(crate) fn dial(address: SocketAddr, limit: Instant) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    match connect(&socket, &address) {
        Ok(()) => {}
        // Interrupted, it goes on as well.
        Err(Errno::INPROGRESS | Errno::INTR) => {
            while !is_settled(&socket, limit)? {}
            sockopt::socket_error(&socket)??;
        }
        Err(error) => return Err(error.into()),
    }
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Waits a while for the attempt's end. Beyond the limit, too, it looks once: refusals are known at once.
fn is_settled(socket: &OwnedFd, limit: Instant) -> io::Result<bool> {
    let left = limit.saturating_duration_since(Instant::now());
    let step = Timespec::try_from(interrupt::slice(left)).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&step)) {
        Ok(0) if left.is_zero() => Err(io::Error::new(io::ErrorKind::TimedOut, "connection timed out")),
        Ok(0) | Err(Errno::INTR) if interrupt::came() => Err(io::Error::other("the wait was interrupted")),
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
    use std::rc::Rc;
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// An address that answers no more: its queue of connections is full. What fills it is returned, to be kept.
    fn silent() -> (TcpListener, Vec<TcpStream>) {
        let socket =
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let listener = TcpListener::from(socket);
        let address = listener.local_addr().unwrap();
        let brief = || Instant::now() + Duration::from_millis(300);
        let filling: Vec<TcpStream> = std::iter::from_fn(|| dial(address, brief()).ok()).take(64).collect();
        assert!(filling.len() < 64, "its queue does not fill");
        (listener, filling)
    }

    #[test]
    fn a_connection_carries_bytes_both_ways_and_blocks() {
        for ip in [Ipv4Addr::LOCALHOST.into(), std::net::IpAddr::from(Ipv6Addr::LOCALHOST)] {
            let Ok(listener) = TcpListener::bind((ip, 0)) else { continue };
            let mut here = dial(listener.local_addr().unwrap(), soon()).unwrap();
            let (mut there, _) = listener.accept().unwrap();
            let mut byte = [0];
            let echo = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(50));
                there.write_all(b"x").unwrap();
            });
            here.read_exact(&mut byte).unwrap();
            assert_eq!(&byte, b"x");
            echo.join().unwrap();
        }
    }

    #[test]
    fn nobody_there_is_an_error_at_once() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert_eq!(dial(address, soon()).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn silence_lasts_until_the_limit() {
        let (listener, _filling) = silent();
        let begun = Instant::now();
        let limit = begun + Duration::from_millis(600);
        let error = dial(listener.local_addr().unwrap(), limit).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(Instant::now() >= limit);
    }

    /// It is asked a few times, and no limit is reached: there is none.
    #[test]
    fn silence_ends_at_an_interrupt() {
        let (listener, _filling) = silent();
        let address = listener.local_addr().unwrap();
        let asked = Rc::new(Cell::new(0));
        let counted = Rc::clone(&asked);
        let ask = move || {
            counted.set(counted.get() + 1);
            counted.get() == 3
        };
        let far = Instant::now() + Duration::from_secs(3600);
        let error = interrupt::during(ask, || dial(address, far)).unwrap_err();
        assert!(error.to_string().contains("interrupted"), "{error}");
        assert_eq!(asked.get(), 3);
    }
}
