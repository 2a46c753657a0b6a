//! One-way times between two processes of this machine: `cargo run --release --example fabric_ping_pong`.
//! Settings as for everything else, e.g. SMDDP_NICS=lo; the first argument is a directory to find libfabric in.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use smddp_core::memory::Region;
use smddp_core::settings::Settings;
use smddp_core::transport::{Ctx, Fabric, Message, MsgKey};
use smddp_core::{Call, Collective, DType};
use smddp_fabric::FabricEndpoint;

const SIZES: [usize; 9] = [8, 1 << 10, 8 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 64 << 20];

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args().nth(1).unwrap_or_default();
    let mut end = FabricEndpoint::open(&Settings::from_env()?, &[PathBuf::from(&dir)])?;
    let mine: Vec<String> = end.address().iter().map(|b| format!("{b:02x}")).collect();
    if std::env::args().nth(2).is_some() {
        println!("{}", mine.concat());
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        end.connect(&unhex(line.trim())?, "the first")?;
        return ping_pong(&mut end, 1);
    }
    let mut other = Command::new(std::env::current_exe()?)
        .args([dir.as_str(), "second"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let (Some(out), Some(input)) = (other.stdout.take(), other.stdin.as_mut()) else {
        return Err("no pipe to the second process".into());
    };
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    writeln!(input, "{}", mine.concat())?;
    end.connect(&unhex(line.trim())?, "the second")?;
    println!("{}", end.describe());
    println!("{:>9}  {:>9}  {:>9}  {:>6}", "bytes", "best us", "median us", "GB/s");
    ping_pong(&mut end, 0)?;
    other.wait()?;
    Ok(())
}

fn unhex(text: &str) -> Result<Vec<u8>, std::num::ParseIntError> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16)).collect()
}

fn ping_pong(end: &mut FabricEndpoint, me: usize) -> Result<(), Box<dyn Error>> {
    for (n, len) in SIZES.into_iter().enumerate() {
        let (mut out, mut into) = (vec![1u8; len], vec![0u8; len]);
        let rounds = if len > 10_000_000 {
            20
        } else if len > 100_000 {
            200
        } else {
            2000
        };
        let mut times = Vec::with_capacity(rounds);
        for round in 0..rounds {
            let key = MsgKey { group: 1, seq: (n * 10_000 + round) as u64, tag: 0 };
            let call = Call::new(Collective::SendRecv, DType::U8, len as u64).pack();
            let make = |region| Message { key, peer: 0, peer_rank: 0, region, call, ctx: Ctx(0) };
            // SAFETY: the buffers outlive the messages: both are over before the round ends.
            let (send, recv) = unsafe { (make(Region::of(&mut out)), make(Region::of(&mut into))) };
            let start = Instant::now();
            let mut done = Vec::new();
            end.recv(recv)?;
            if me == 1 {
                wait(end, &mut done, 1)?;
            }
            end.send(send)?;
            wait(end, &mut done, 2)?;
            times.push(start.elapsed() / 2);
        }
        times.sort_unstable();
        let (best, median) = (times[0], times[rounds / 2]);
        if me == 0 {
            let rate = len as f64 / best.as_secs_f64() / 1e9;
            println!("{len:>9}  {:>9.1}  {:>9.1}  {rate:>6.2}", micros(best), micros(median));
        }
    }
    Ok(())
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn wait(end: &mut FabricEndpoint, done: &mut Vec<Ctx>, n: usize) -> Result<(), Box<dyn Error>> {
    while done.len() < n {
        if !end.poll(done).map_err(|f| f.error)? {
            std::thread::yield_now();
        }
    }
    Ok(())
}
