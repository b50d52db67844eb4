// SPDX-License-Identifier: Apache-2.0
//
// The memory of the simulated board: a mapped file behind AXI4 slave ports, called from board.sv
// once per channel pair and clock cycle.
//
// It looks for hazards: a read takes its bytes when its request is taken, a write puts them into
// memory when its response is offered, so that a master that does not wait for the response reads
// old data. It checks the rules of AXI4 that a slave can see, and ends the simulation with a
// message where a master breaks them.
//
// Arguments (+name=value), with defaults:
//   memory_file       file of the contents, required
//   memory_size       its bytes, required
//   memory_base       address of its first byte (0)
//   memory_latency    cycles from a request, or a write's last beat, to the first response (16)
//   memory_stall_X    probability in 256ths that the channel ar, r, aw, w or b stalls in a cycle (0)
//   memory_reorder    1: responses of different IDs come in any order, read beats interleaved (0)
//   memory_seed       of stalls and order (0)
//   memory_fault_N    for N = 0, 1, ...: "first,last,response" (hexadecimal addresses): accesses of
//                     these bytes, which need not be in the memory, are answered with SLVERR (2) or
//                     DECERR (3), and change nothing

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "svdpi.h"
#include "verilated.h"

namespace {

constexpr uint32_t kIncr = 1;
constexpr uint64_t kPageBytes = 4096;
constexpr size_t kMaxBeats = 256;
// What a read of a faulty address gives.
constexpr uint8_t kFaultyByte = 0xdb;

// Value of the argument "+name=value", or null.
const char* argument(const std::string& name) {
    const std::string prefix = name + "=";
    const char* const match = Verilated::threadContextp()->commandArgsPlusMatch(prefix.c_str());
    return *match ? match + 1 + prefix.size() : nullptr;
}

uint64_t number(const std::string& name, uint64_t otherwise) {
    const char* const text = argument(name);
    return text ? std::strtoull(text, nullptr, 0) : otherwise;
}

// Ends the simulation after this time step, so that waves are complete.
void end_simulation(const std::string& message) {
    std::printf("memory: %s\n", message.c_str());
    std::fflush(stdout);
    Verilated::threadContextp()->gotFinish(true);
}

std::string hexadecimal(uint64_t value) {
    char text[20];
    std::snprintf(text, sizeof text, "0x%" PRIx64, value);
    return text;
}

// xorshift64*, by Marsaglia and Vigna.
class Random {
public:
    explicit Random(uint64_t seed) : state_{(seed + 1) * 0x9e3779b97f4a7c15} {
        for (int i = 0; i < 8; ++i) next();
    }

    uint32_t below(uint32_t bound) { return static_cast<uint64_t>(next()) * bound >> 32; }

    bool chance(uint32_t in_256) { return in_256 != 0 && below(256) < in_256; }

private:
    uint32_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1d >> 32);
    }

    uint64_t state_;
};

// The contents and the options that all ports share.
class Memory {
public:
    static Memory& instance() {
        static Memory memory;
        return memory;
    }

    // Response to an access of bytes first .. first + bytes - 1: xRESP.
    uint32_t response(uint64_t first, uint64_t bytes) const {
        for (const Fault& fault : faults_)
            if (first <= fault.last && first + bytes > fault.first) return fault.response;
        return 0;
    }

    bool contains(uint64_t first, uint64_t bytes) const {
        return first >= base_ && first - base_ <= size_ && bytes <= size_ - (first - base_);
    }

    uint8_t* at(uint64_t address) const { return bytes_ + (address - base_); }

    const uint64_t latency = number("memory_latency", 16);
    const bool reorder = number("memory_reorder", 0) != 0;
    const uint64_t seed = number("memory_seed", 0);

private:
    struct Fault {
        uint64_t first, last;
        uint32_t response;
    };

    Memory() {
        const char* const file = argument("memory_file");
        const int descriptor = file ? open(file, O_RDWR) : -1;
        void* const mapped =
            mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
        if (mapped == MAP_FAILED) {
            std::perror("memory: cannot map memory_file");
            std::exit(1);
        }
        close(descriptor);
        bytes_ = static_cast<uint8_t*>(mapped);
        while (const char* text = argument("memory_fault_" + std::to_string(faults_.size()))) {
            Fault fault;
            if (std::sscanf(text, "%" SCNx64 ",%" SCNx64 ",%" SCNu32, &fault.first, &fault.last,
                            &fault.response) != 3) {
                std::fprintf(stderr, "memory: bad argument %s\n", text);
                std::exit(1);
            }
            faults_.push_back(fault);
        }
    }

    const uint64_t size_ = number("memory_size", 0);
    const uint64_t base_ = number("memory_base", 0);
    uint8_t* bytes_;
    std::vector<Fault> faults_;
};

// Payload of an address channel.
struct Request {
    uint32_t id;
    uint64_t address;
    uint32_t length, size, burst;

    bool operator==(const Request& other) const {
        return id == other.id && address == other.address && length == other.length &&
               size == other.size && burst == other.burst;
    }

    uint32_t beats() const { return length + 1; }
};

// Payload of the write data channel.
struct WriteBeat {
    std::vector<uint8_t> bytes, strobes;
    bool last = false;

    bool operator==(const WriteBeat& other) const {
        return bytes == other.bytes && strobes == other.strobes && last == other.last;
    }
};

// Sees that what a master offers on a channel stays until it is taken.
template <typename Payload>
class Offer {
public:
    // Whether the rule holds in this cycle.
    bool check(bool valid, bool ready, const Payload& payload) {
        const bool kept = !waiting_ || (valid && payload == payload_);
        waiting_ = valid && !ready;
        if (waiting_) payload_ = payload;
        return kept;
    }

    void reset() { waiting_ = false; }

private:
    bool waiting_ = false;
    Payload payload_{};
};

// What the read and the write half of a port have in common.
class Port {
public:
    Port(std::string name, uint32_t beat_bytes, uint64_t stream)
        : name_{std::move(name)}, beat_bytes_{beat_bytes}, random_{memory_.seed * 64 + stream} {}

protected:
    uint32_t stall(const char* channel) const {
        return static_cast<uint32_t>(number(std::string{"memory_stall_"} + channel, 0));
    }

    // Cycle from which on a response may be driven to something taken in this cycle.
    uint64_t due() const { return cycle_ + (memory_.latency ? memory_.latency - 1 : 0); }

    void violation(const std::string& message) const {
        end_simulation(name_ + ", cycle " + std::to_string(cycle_) + ": " + message);
    }

    // Whether a burst may be carried out.
    bool check_burst(const char* channel, const Request& request) const {
        const uint64_t bytes = static_cast<uint64_t>(request.beats()) * beat_bytes_;
        std::string wrong;
        if (request.burst != kIncr) {
            wrong = "burst type is " + std::to_string(request.burst) + ", expected INCR (1)";
        } else if (1u << request.size != beat_bytes_) {
            wrong = "beats of " + std::to_string(1u << request.size) + " bytes, expected " +
                    std::to_string(beat_bytes_);
        } else if (request.address % beat_bytes_) {
            wrong = "the address is not a multiple of a beat";
        } else if (request.address % kPageBytes + bytes > kPageBytes) {
            wrong = "the burst crosses a multiple of 4 KiB";
        } else if (!answerable(request)) {
            wrong = "the burst leaves the memory";
        }
        if (wrong.empty()) return true;
        violation(std::string{channel} + " " + hexadecimal(request.address) + ", " +
                  std::to_string(request.beats()) + " beats: " + wrong);
        return false;
    }

    // The burst to go on with: the oldest, or any that is the oldest of its ID; none before its
    // time.
    template <typename Burst>
    int choose(const std::deque<Burst>& bursts) {
        if (bursts.empty()) return -1;
        if (!memory_.reorder) return bursts.front().due <= cycle_ ? 0 : -1;
        std::vector<int> candidates;
        std::vector<uint32_t> ids;
        for (size_t i = 0; i < bursts.size(); ++i) {
            bool oldest = true;
            for (const uint32_t id : ids) oldest &= id != bursts[i].id;
            if (oldest && bursts[i].due <= cycle_) candidates.push_back(static_cast<int>(i));
            ids.push_back(bursts[i].id);
        }
        return candidates.empty() ? -1 : candidates[random_.below(candidates.size())];
    }

    // Whether each beat is in the memory or faulty.
    bool answerable(const Request& request) const {
        for (uint32_t i = 0; i < request.beats(); ++i) {
            const uint64_t address = request.address + i * beat_bytes_;
            if (!memory_.contains(address, beat_bytes_) && !memory_.response(address, beat_bytes_))
                return false;
        }
        return true;
    }

    Memory& memory_ = Memory::instance();
    const std::string name_;
    const uint32_t beat_bytes_;
    Random random_;
    uint64_t cycle_ = 0;
};

class ReadPort : public Port {
public:
    using Port::Port;

    // Outputs of the slave.
    struct Slave {
        bool arready, rvalid, rlast;
        uint32_t rid, rresp;
    };

    // One clock edge: what the master drove before it, then what the slave drives after it.
    const Slave& cycle(bool rst, bool arvalid, const Request& request, bool rready,
                       svBitVecVal* rdata) {
        if (rst) {
            slave_ = {};
            bursts_.clear();
            offer_.reset();
            cycle_ = 0;
            return slave_;
        }
        if (!offer_.check(arvalid, slave_.arready, request))
            violation("ar: an offer changed or was withdrawn");
        if (arvalid && slave_.arready && check_burst("ar", request)) accept(request);
        if (!slave_.rvalid || rready) {
            slave_.rvalid = false;
            const int index = choose(bursts_);
            if (index >= 0 && !random_.chance(stall_r_)) send(index);
        }
        if (slave_.rvalid) std::memcpy(rdata, beat_.data(), beat_bytes_);
        slave_.arready = !random_.chance(stall_ar_);
        ++cycle_;
        return slave_;
    }

private:
    struct Burst {
        uint32_t id;
        uint64_t address, due;
        std::vector<uint8_t> bytes;
        size_t sent;
    };

    void accept(const Request& request) {
        Burst burst{request.id, request.address, due(), {}, 0};
        burst.bytes.resize(request.beats() * beat_bytes_, kFaultyByte);
        for (size_t offset = 0; offset < burst.bytes.size(); offset += beat_bytes_) {
            const uint64_t address = request.address + offset;
            if (!memory_.response(address, beat_bytes_))
                std::memcpy(&burst.bytes[offset], memory_.at(address), beat_bytes_);
        }
        bursts_.push_back(std::move(burst));
    }

    void send(int index) {
        Burst& burst = bursts_[index];
        slave_.rvalid = true;
        slave_.rid = burst.id;
        slave_.rresp = memory_.response(burst.address + burst.sent, beat_bytes_);
        const auto first = burst.bytes.begin() + burst.sent;
        beat_.assign(first, first + beat_bytes_);
        burst.sent += beat_bytes_;
        slave_.rlast = burst.sent == burst.bytes.size();
        if (slave_.rlast) bursts_.erase(bursts_.begin() + index);
    }

    const uint32_t stall_ar_ = stall("ar"), stall_r_ = stall("r");
    Slave slave_{};
    Offer<Request> offer_;
    std::deque<Burst> bursts_;
    std::vector<uint8_t> beat_;
};

class WritePort : public Port {
public:
    using Port::Port;

    // Outputs of the slave.
    struct Slave {
        bool awready, wready, bvalid;
        uint32_t bid, bresp;
    };

    // One clock edge: what the master drove before it, then what the slave drives after it.
    const Slave& cycle(bool rst, bool awvalid, const Request& request, bool wvalid,
                       const svBitVecVal* wdata, const svBitVecVal* wstrb, bool wlast,
                       bool bready) {
        if (rst) {
            slave_ = {};
            requests_.clear();
            data_.clear();
            bursts_.clear();
            request_offer_.reset();
            data_offer_.reset();
            cycle_ = 0;
            return slave_;
        }
        if (!request_offer_.check(awvalid, slave_.awready, request))
            violation("aw: an offer changed or was withdrawn");
        if (awvalid && slave_.awready && check_burst("aw", request)) requests_.push_back(request);
        take_data(wvalid, wdata, wstrb, wlast);
        match();
        if (!slave_.bvalid || bready) {
            slave_.bvalid = false;
            const int index = choose(bursts_);
            if (index >= 0 && !random_.chance(stall_b_)) respond(index);
        }
        slave_.awready = !random_.chance(stall_aw_);
        slave_.wready = !random_.chance(stall_w_);
        ++cycle_;
        return slave_;
    }

private:
    // Request and all data of a burst.
    struct Burst {
        uint32_t id;
        uint64_t address, due;
        std::vector<WriteBeat> beats;
    };

    void take_data(bool wvalid, const svBitVecVal* wdata, const svBitVecVal* wstrb, bool wlast) {
        WriteBeat beat;
        if (wvalid) {
            const auto* const bytes = reinterpret_cast<const uint8_t*>(wdata);
            const auto* const strobes = reinterpret_cast<const uint8_t*>(wstrb);
            beat.bytes.assign(bytes, bytes + beat_bytes_);
            beat.strobes.assign(strobes, strobes + beat_bytes_ / 8);
            beat.last = wlast;
        }
        if (!data_offer_.check(wvalid, slave_.wready, beat))
            violation("w: an offer changed or was withdrawn");
        if (wvalid && slave_.wready) data_.push_back(std::move(beat));
    }

    // Puts data together with the oldest request; data may come first.
    void match() {
        if (requests_.empty()) {
            if (data_.size() > kMaxBeats) violation("w: 256 beats without a request");
            return;
        }
        const Request& request = requests_.front();
        const size_t there = data_.size() < request.beats() ? data_.size() : request.beats();
        for (size_t i = 0; i < there; ++i) {
            if (data_[i].last != (i + 1 == request.beats())) {
                violation("w: wlast is " + std::to_string(data_[i].last) + " in beat " +
                          std::to_string(i) + " of the burst of " +
                          std::to_string(request.beats()) + " beats at " +
                          hexadecimal(request.address));
                return;
            }
        }
        if (there < request.beats()) return;
        Burst burst{request.id, request.address, due(), {}};
        burst.beats.assign(std::make_move_iterator(data_.begin()),
                           std::make_move_iterator(data_.begin() + request.beats()));
        data_.erase(data_.begin(), data_.begin() + request.beats());
        requests_.pop_front();
        bursts_.push_back(std::move(burst));
    }

    void respond(int index) {
        const Burst& burst = bursts_[index];
        const uint64_t bytes = burst.beats.size() * beat_bytes_;
        slave_.bvalid = true;
        slave_.bid = burst.id;
        slave_.bresp = memory_.response(burst.address, bytes);
        for (size_t i = 0; i < burst.beats.size(); ++i) {
            const uint64_t address = burst.address + i * beat_bytes_;
            if (!memory_.response(address, beat_bytes_)) store(address, burst.beats[i]);
        }
        bursts_.erase(bursts_.begin() + index);
    }

    void store(uint64_t address, const WriteBeat& beat) const {
        for (uint32_t i = 0; i < beat_bytes_; ++i)
            if (beat.strobes[i / 8] >> i % 8 & 1) *memory_.at(address + i) = beat.bytes[i];
    }

    const uint32_t stall_aw_ = stall("aw"), stall_w_ = stall("w"), stall_b_ = stall("b");
    Slave slave_{};
    Offer<Request> request_offer_;
    Offer<WriteBeat> data_offer_;
    std::deque<Request> requests_;
    std::deque<WriteBeat> data_;
    std::deque<Burst> bursts_;
};

std::vector<std::unique_ptr<ReadPort>> read_ports;
std::vector<std::unique_ptr<WritePort>> write_ports;

}  // namespace

extern "C" {

int memory_open_read(const char* name, int beat_bytes) {
    const uint64_t stream = 2 * read_ports.size();
    read_ports.push_back(std::make_unique<ReadPort>(name, beat_bytes, stream));
    return static_cast<int>(read_ports.size()) - 1;
}

int memory_open_write(const char* name, int beat_bytes) {
    const uint64_t stream = 2 * write_ports.size() + 1;
    write_ports.push_back(std::make_unique<WritePort>(name, beat_bytes, stream));
    return static_cast<int>(write_ports.size()) - 1;
}

void memory_read(int port, svBit rst, svBit arvalid, unsigned arid, uint64_t araddr,
                 unsigned arlen, unsigned arsize, unsigned arburst, svBit rready, svBit* arready,
                 svBit* rvalid, unsigned* rid, svBitVecVal* rdata, unsigned* rresp,
                 svBit* rlast) {
    const ReadPort::Slave& slave = read_ports[port]->cycle(
        rst, arvalid, {arid, araddr, arlen, arsize, arburst}, rready, rdata);
    *arready = slave.arready;
    *rvalid = slave.rvalid;
    *rid = slave.rid;
    *rresp = slave.rresp;
    *rlast = slave.rlast;
}

void memory_write(int port, svBit rst, svBit awvalid, unsigned awid, uint64_t awaddr,
                  unsigned awlen, unsigned awsize, unsigned awburst, svBit wvalid,
                  const svBitVecVal* wdata, const svBitVecVal* wstrb, svBit wlast, svBit bready,
                  svBit* awready, svBit* wready, svBit* bvalid, unsigned* bid, unsigned* bresp) {
    const WritePort::Slave& slave = write_ports[port]->cycle(
        rst, awvalid, {awid, awaddr, awlen, awsize, awburst}, wvalid, wdata, wstrb, wlast, bready);
    *awready = slave.awready;
    *wready = slave.wready;
    *bvalid = slave.bvalid;
    *bid = slave.bid;
    *bresp = slave.bresp;
}
}
